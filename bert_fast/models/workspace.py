"""Memory that inference on the CPU uses again and again."""

import threading

import torch
from torch import Tensor


class Workspace:
    """Activations that inference reuses from layer to layer and call to call.

    A fresh activation of some megabytes comes as untouched pages, and faulting them in costs more
    than the arithmetic of a GELU (measured on a CPU: 16 ms against 2). Each thread has its own
    buffers, so a model may be called from several.
    """

    def __init__(self):
        self._local = threading.local()

    def __reduce__(self):  # copies and pickles start empty
        return Workspace, ()

    def take(self, name, rows, width, like):
        """An uninitialised (rows, width) tensor that the next ``take(name, ...)`` overwrites."""
        buffers = self._local.__dict__
        buffer = buffers.get(name)
        if buffer is None or buffer.numel() < rows * width or buffer.dtype != like.dtype:
            with torch.inference_mode(False):  # usable inside and outside inference mode
                buffer = buffers[name] = torch.empty(rows * width, dtype=like.dtype)
        return buffer[: rows * width].view(rows, width)

    def over(self, tensor):
        """The memory of a tensor that is read for the last time."""
        return tensor


class Kept:
    """A workspace where layers may not write over what they have read: somebody looks at it."""

    def __init__(self, workspace):
        self.take = workspace.take

    def over(self, tensor):
        return None


class Fresh:
    """Memory that is new each time."""

    def take(self, name, rows, width, like):
        return like.new_empty(rows, width)


class NoWorkspace:
    """Training, tracing, devices: every result is a new tensor."""

    def take(self, name, rows, width, like):
        return None

    def over(self, tensor):
        return None


def can_reuse_memory(x):
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
    )
