"""Memory for packed weights on the CPU."""

import contextlib
import mmap

import torch

HUGE_PAGE = 2 << 20


def packed_memory(size):
    """``size`` bytes for a packed weight, from a cache line on: a vector then never crosses two. A
    large one lies in huge pages where the system gives them when asked: with pages of 4 KB a query
    of 16 tokens, which reads each weight once, waits a sixth of its time for where they are."""
    tail = size % HUGE_PAGE
    whole = size - tail + HUGE_PAGE if tail > HUGE_PAGE * 3 // 4 else size
    if whole < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        memory = torch.empty(size + 64, dtype=torch.uint8)
        return memory[-memory.data_ptr() % 64 :][:size]
    try:  # what is not touched, before and after, takes addresses alone
        region = mmap.mmap(-1, whole + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:  # as torch says it
        raise RuntimeError(f"can't allocate memory: {size} bytes for a packed weight") from error
    start = -torch.frombuffer(region, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    with contextlib.suppress(OSError):  # a system built without them
        region.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return torch.frombuffer(region, dtype=torch.uint8, offset=start, count=size)
