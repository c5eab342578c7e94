"""How calls are timed. Contestants take turns, round after round (A B C A B C ...), so that what
the machine does meanwhile hits all of them alike; a number is the median of its rounds."""

import contextlib
import ctypes
import gc
import statistics
import sys
import time
from pathlib import Path

import torch

from bert_fast.devices import own_workspaces

LEAST_ROUNDS = 5
L2_TIMES = 4  # inputs rotate through this many L2s, so that none is still there at its next turn


class WallClock:
    """For the CPU. A sample is at least ``shortest`` seconds long, several calls if need be."""

    method = "wall clock"

    def __init__(self, pause=0.0, shortest=2e-3):
        self.pause, self.shortest = pause, shortest

    def copies(self, num_bytes):
        return 1

    def sampler(self, calls):
        """Returns (sample, method): sample() gives milliseconds a call."""
        (call,) = calls
        call()
        begin = time.perf_counter()
        call()
        number = max(1, round(self.shortest / (time.perf_counter() - begin + 1e-9)))

        def sample():
            if self.pause:  # threads of the contestant before may still be spinning
                time.sleep(self.pause)
                # Threads that slept may wake on one core, and are moved apart only in some 40 ms.
                warm = time.perf_counter() + self.pause
                while time.perf_counter() < warm:
                    call()
            begin = time.perf_counter()
            for _ in range(number):
                call()
            return (time.perf_counter() - begin) * 1e3 / number

        return sample, self.method


class CudaEvents:
    """For a GPU: one sample is a run over all copies of the inputs, together larger than the L2,
    between two events. Where ``graphs``, it is captured once and replayed, so that the time is the
    GPU's alone; what cannot be captured is launched from Python, and ``method`` says so."""

    def __init__(self, graphs=True):
        self.graphs = graphs

    def copies(self, num_bytes):
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        return max(2, min(64, -(-L2_TIMES * l2 // max(num_bytes, 1))))

    def sampler(self, calls):
        def once():
            for call in calls:
                call()

        once(), once()
        torch.cuda.synchronize()
        replay, method = once, "events"
        if self.graphs:
            graph = torch.cuda.CUDAGraph()
            with contextlib.suppress(RuntimeError), own_workspaces():
                with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                    once()
                replay, method = graph.replay, "graph"

        def sample():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / len(calls)

        return sample, method


def clock(device, pause=0.0, graphs=True):
    return CudaEvents(graphs) if device == "cuda" else WallClock(pause)


def host_microseconds(calls, rounds=20):
    """What a call costs the CPU that launches it, when nothing waits for the GPU."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for call in calls[:4]:
            call()
        times.append((time.perf_counter() - begin) * 1e6 / len(calls[:4]))
    torch.cuda.synchronize()
    return statistics.median(times)


def interleaved(samplers, seconds, rounds=None, at_least=LEAST_ROUNDS, at_most=200):
    """name -> milliseconds of each round. ``rounds``, or as many as fit in ``seconds``."""
    times, begin = {name: [] for name in samplers}, time.monotonic()
    count = 0
    while count < (rounds or at_least) or (
        rounds is None and count < at_most and time.monotonic() - begin < seconds
    ):
        for name, sample in samplers.items():
            times[name].append(sample())
        count += 1
    return times


def summary(blocks):
    """Median and spread of all rounds, given by blocks. The spread is the middle half, widened to
    hold every block's median: what moved between blocks may move between runs."""
    ordered = sorted(ms for block in blocks for ms in block)
    quarter, medians = len(ordered) // 4, [statistics.median(block) for block in blocks]
    low, high = min(ordered[quarter], *medians), max(ordered[-1 - quarter], *medians)
    return {"ms": statistics.median(ordered), "spread": [low, high], "rounds": len(ordered)}


def peak_memory(call, device):
    """Bytes that a call takes at its peak beyond what was there before: the GPU's allocator, or
    this process's memory on Linux; None elsewhere."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return None
    try:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 0)
    except OSError:  # a kernel or container without it
        return None


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
