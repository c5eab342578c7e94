"""Where a kernel is launched, and what is said when that fails: for the backends that launch."""

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
