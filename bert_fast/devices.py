"""For what launches: where a kernel is launched, what is said when that fails, where what a kernel
sums for many lies, and where a captured graph's products work."""

import contextlib
import functools
import inspect
import threading

import torch
from torch import Tensor


def on_own_device(backend):
    """For a function that launches kernels, whose first argument is a tensor: the tensor's device
    is the current one while it runs, so that launches, their streams (the caller's, of that
    device), memory and timings are that device's. ``torch.cuda.device`` also gives a thread without
    a CUDA context one, and makes none on another device.

    What Triton could not compile or launch becomes a RuntimeError that names the function, its
    arguments and the device. Nothing stays behind of such an error: the next call is not touched.
    """

    def decorate(function):
        @functools.wraps(function)
        def run(*args, **options):
            device = args[0].device
            index = device.index  # None: no GPU
            if index is None:
                return function(*args, **options)
            try:
                if _is_current(index):
                    return function(*args, **options)
                with torch.cuda.device(device):
                    return function(*args, **options)
            except Exception as error:
                if not _of_triton(error):
                    raise
                given = inspect.signature(function).bind(*args, **options).arguments
                named = (
                    (name, t) for name, value in given.items()
                    for t in (value if isinstance(value, tuple) else (value,))
                )  # fmt: skip
                shapes = ", ".join(
                    f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
                    for name, t in named if isinstance(t, Tensor)
                )  # fmt: skip
                raise RuntimeError(
                    f"{backend}_{function.__name__} ({shapes}) on {device}: {error}"
                ) from error

        return run

    return decorate


_threads = threading.local()


def _is_current(index):
    """Whether that GPU is this thread's current one, with a context. A thread's first call says no:
    the context manager gives it one."""
    if index in getattr(_threads, "seen", ()):
        return torch.cuda.current_device() == index
    _threads.seen = {*getattr(_threads, "seen", ()), index}
    return False


def _of_triton(error):
    """A compiler's or a launch's own, not what torch says of memory or of an earlier kernel."""
    return type(error).__module__.startswith("triton.") or (
        type(error) is RuntimeError and str(error).startswith("Triton Error")
    )


@contextlib.contextmanager
def own_workspaces():
    """For a CUDA graph's capture, all of it: its matrix products work in memory of the graph's own.

    torch keeps cuBLAS' workspaces by stream, and one stream makes all captures. Without this a
    graph's products would work where those of other graphs do, and, once that memory's holder is
    gone, or torch.compile's graphs or the end of any graph have let all workspaces go, where
    somebody else's tensors are or nothing is (pytorch/pytorch#193402).

    As torch.compile does for its graphs, it lets go of the workspaces of all streams, which come
    back with the next product. Who captures in a thread beside others that multiply in the same
    stream leaves torch a moment in which one may be handed on while it is used.
    """
    torch._C._cuda_clearCublasWorkspaces()  # lest the capture takes one that is there
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()  # lest others take the graph's


def memory_of_sums(kinds, block, dtype):
    """An empty tensor for the sums of some (sums, count, width) tensors, one after another, each
    from a multiple of ``block`` numbers on; and the sums as parts of it: a list for each of
    ``kinds``.

    To autograd the parts are tensors of their own: what one's holder writes to it is no change of
    the others.
    """
    sizes, places = _layout(block, *[(kind.shape[0], kind.shape[2]) for kind in kinds])
    out = kinds[0].new_empty(sum(sizes), dtype=dtype)
    parts = torch.unsafe_split_with_sizes(out, sizes)
    return out, [[parts[i] for i in of_kind] for of_kind in places]


@functools.lru_cache(256)
def _layout(block, *shapes):
    """Sizes of the parts, and of gaps between them; and which are each (sums, width)'s."""
    sizes, places = [], []
    for sums, width in shapes:
        gap = -width % block
        each = (width, gap) if gap else (width,)
        places.append(range(len(sizes), len(sizes) + sums * len(each), len(each)))
        sizes += each * sums
    return sizes, places
