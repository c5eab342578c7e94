"""Rows in float8 (e4m3), each with a scale of its own, and products of them. Experimental: its
numbers are tested on a CPU and in Triton's interpreter; no GPU has run it.

For inference alone, and called by models that run uncompiled: these are no ``torch.library`` ops.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bert_fast import backends
from bert_fast.ops import reference
from bert_fast.ops.checks import (
    Approximate,
    check,
    check_approximate,
    check_same_dtype,
    check_tensors,
    check_vector,
    shape_of,
)
from bert_fast.ops.gelu import gelu
from bert_fast.ops.layer_norm import layer_norm
from bert_fast.ops.library import needs_grad_of


class Rows(NamedTuple):
    """elements (rows, width) float8_e4m3fn; scale (rows,) float32: what their rows are times."""

    elements: Tensor
    scale: Tensor


class Rounded(NamedTuple):
    """What layers hand on: ``value`` (rows, width), which the next one adds to and normalises, and
    the same as ``rows``, which it multiplies."""

    value: Tensor
    rows: Rows

    @property
    def shape(self):
        return self.value.shape

    @property
    def device(self):
        return self.value.device


def float8(x: Tensor) -> Rows:
    """``x`` (rows, width), of any float dtype, as :func:`bert_fast.ops.reference.float8` rounds it
    (Micikevicius et al. 2022, "FP8 formats for deep learning"; a scale for each token as in
    Dettmers et al. 2022).

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        RuntimeError: a gradient is wanted.
    """
    name, x = _checked(x), x.contiguous()
    if name == "eager":
        return Rows(*reference.float8(x))
    return Rows(*backends.module(name).float8_forward(x)[1:])


def gelu_float8(x: Tensor, bias: Tensor | None = None, approximate: Approximate = "none") -> Rows:
    """:func:`float8` of :func:`gelu` (x, bias), one kernel where the backend has it; the same
    numbers."""
    check_approximate(approximate)
    name = _checked(x, bias=bias)
    if name == "eager":
        return float8(gelu(x, bias, approximate=approximate))
    return Rows(*backends.module(name).float8_forward(x.contiguous(), bias, approximate)[1:])


def layer_norm_float8(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, linear_bias: Tensor | None = None,
    eps: float = 1e-12,
) -> Rounded:  # fmt: skip
    """:func:`layer_norm` of these, and :func:`float8` of that, one kernel where the backend has it;
    the same numbers."""
    name = _checked(x, residual, weight=weight, bias=bias, linear_bias=linear_bias)
    if name == "eager":
        out = layer_norm(x, weight, bias, residual=residual, linear_bias=linear_bias, eps=eps)
        return Rounded(out, float8(out))
    out, *rows = backends.module(name).float8_forward(
        x.contiguous(), linear_bias, None, residual.contiguous(), (weight, bias, eps)
    )
    return Rounded(out, Rows(*rows))


def _checked(x, residual=None, **vectors):
    """The backend for arguments that fit."""
    check_tensors(("x", x), residual=residual, **vectors)
    check(x.ndim == 2 and x.shape[1] >= 1, lambda: f"x must be (rows, width), not {shape_of(x)}")
    check_same_dtype(("x", x), residual=residual)
    check(
        residual is None or residual.shape == x.shape,
        lambda: f"residual must have x's shape {shape_of(x)}, not {shape_of(residual)}",
    )
    for name, vector in vectors.items():
        check_vector(name, vector, x.shape[1])
    needs_grad = needs_grad_of(x, residual, *vectors.values())
    check(not needs_grad, "float8 is for inference: call under torch.no_grad()", RuntimeError)
    return backends.choose("float8", x.device, x.dtype, False, None, x.shape[1])


def scaled_product(x, weight, bias):
    """:func:`bert_fast.ops.reference.float8_product` of two :class:`Rows`, by torch."""
    return torch._scaled_mm(  # not with use_fast_accum, whose sums have fewer bits
        x.elements, weight.elements.t(), scale_a=x.scale.unsqueeze(1),
        scale_b=weight.scale.unsqueeze(0), bias=bias, out_dtype=torch.bfloat16,
    )  # fmt: skip


class Float8Weight:
    """A linear layer's weight (out_width, width) in float8, with a scale for each output channel,
    in the place of the weight itself (compare :class:`bert_fast.backends.cpu.PackedWeight`)."""

    released, rounds, precision, x_factor = True, False, "float8", None

    def __init__(self, weight):
        self.shape = weight.shape
        self.rows = Rows(*reference.float8(weight.detach().contiguous()))

    def __getstate__(self):  # pickle cannot read float8 back
        elements, scale = self.rows
        return {"shape": self.shape, "rows": (elements.view(torch.uint8), scale)}

    def __setstate__(self, state):
        elements, scale = state["rows"]
        self.shape, self.rows = state["shape"], Rows(elements.view(torch.float8_e4m3fn), scale)

    def release(self):
        """Nothing was kept of the weight itself."""

    def elements(self):
        return *self.rows, None

    def product(self, x: Rows, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias, (rows, out_width) bfloat16: on a GPU torch's scaled product by row, which
        takes widths that are multiples of 16 and a bias in bfloat16; on a CPU its definition."""
        if x.elements.device.type != "cuda":
            return reference.float8_product(*x, self.rows.elements, self.rows.scale, bias)
        if not len(x.elements):
            return x.scale.new_empty(0, self.shape[0], dtype=torch.bfloat16)
        return scaled_product(x, self.rows, bias)
