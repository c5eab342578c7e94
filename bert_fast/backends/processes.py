"""Forked processes: what GNU's OpenMP, by which torch computes, cannot do there.

Its threads do not survive a fork, and its next parallel loop waits for them for ever. A child of a
process that has several threads is therefore left one thread for torch, as torch's own DataLoader
does with its workers; ours would need no such rule (csrc/cpu/threads.cpp). A child that is not
forked but spawned, or a parent that has started no thread yet, is left alone.
"""

import os
import sys

import torch

forked = False  # whether this process is such a child
_threads_before = 1


def _count_threads():
    global _threads_before
    _threads_before = len(os.listdir("/proc/self/task"))


def _keep_one_thread():
    global forked
    if _threads_before > 1:
        forked = True
        torch.set_num_threads(1)


if sys.platform == "linux":
    os.register_at_fork(before=_count_threads, after_in_child=_keep_one_thread)
