"""Forked processes: what GNU's OpenMP (libgomp), by which torch computes, cannot do there.

Its threads do not survive a fork, and its next parallel loop waits for them for ever. So a thread
that forks ends its own OpenMP threads just before; it and the child start new ones when they next
compute, as many as before, and their numbers are the same. Only where a library older than GCC 9's
cannot do that is the child left one thread for torch, with a warning; our kernels need neither
(csrc/cpu/threads.cpp). LLVM's and Intel's OpenMP see to forks themselves.
"""

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator

import torch

HARD = 2  # omp_pause_hard (OpenMP 5.0, section 3.2.44)

forked = False  # whether this process is a child whose OpenMP would hang
_could_not_end = False


def _gnu_openmp() -> Iterator[ctypes.CDLL]:
    """By the libraries that use it: torch's may have another file of it than ours."""
    names = ["libtorch_cpu.so"]
    if extension := sys.modules.get("bert_fast._C"):
        names.append(str(extension.__file__))
    for name in names:
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
        except OSError:
            continue
        if hasattr(library, "GOMP_parallel") and not hasattr(library, "__kmpc_fork_call"):
            yield library


def _end_threads() -> None:
    global _could_not_end
    _could_not_end = False
    # Without other threads there are none to end; and a process that was itself forked, before this
    # module came, would wait here for threads that it never had.
    if len(os.listdir("/proc/self/task")) > 1:
        for library in _gnu_openmp():
            pause = getattr(library, "omp_pause_resource_all", None)
            if pause is None or pause(HARD) != 0:
                _could_not_end = True


def _keep_one_thread() -> None:
    global forked
    if _could_not_end:
        forked = True
        torch.set_num_threads(1)
        warnings.warn(
            "bert_fast: in this forked process torch computes with one thread, because its OpenMP "
            "library cannot start new ones after a fork; 'spawn' processes for more",
            stacklevel=1,
        )


if sys.platform == "linux":
    os.register_at_fork(before=_end_threads, after_in_child=_keep_one_thread)
