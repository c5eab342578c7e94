"""What a peer makes of a work: the calls that are timed, and the results that are compared."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


def _same(tensor):
    return tensor


@dataclass
class Run:
    """One contestant's way to do a work on one copy of the inputs, in its own layout.

    forward: no arguments; returns the output. packed: a tensor of that layout -> real tokens.
    leaves, dout: for backward, what gradients are taken of, and the output's gradient.
    gradient: the gradients of the leaves -> what is compared (default: each of them, packed).
    """

    forward: Callable
    packed: Callable = _same
    leaves: tuple = ()
    dout: torch.Tensor | None = None
    gradient: Callable | None = None

    def call(self, backward):
        """What is timed: forward; or backward alone, of a forward that is done here."""
        if not backward:
            return self.forward
        with torch.enable_grad():
            out = self.forward()
        return lambda: torch.autograd.grad(out, self.leaves, self.dout, retain_graph=True)

    def results(self, backward):
        if not backward:
            return [self.packed(self.forward())]
        with torch.enable_grad():
            out = self.forward()
        gradients = torch.autograd.grad(out, self.leaves, self.dout)
        packed = self.gradient or (lambda grads: [self.packed(g) for g in grads])
        return [self.packed(out.detach()), *packed(gradients)]
