"""GELU with the bias of the linear layer before it."""

import torch
from torch import Tensor

from bert_fast import backends
from bert_fast.backends import BackendName
from bert_fast.ops import reference
from bert_fast.ops.checks import (
    Approximate,
    check,
    check_approximate,
    check_out,
    check_tensors,
    check_vector,
    shape_of,
)
from bert_fast.ops.library import (
    call,
    call_backward,
    contiguous_like,
    define,
    fake,
    needs_grad_of,
    refuse_second_derivative,
    register_autocast,
    register_autograd,
)


def gelu(
    x: Tensor, bias: Tensor | None = None, *, approximate: Approximate = "none",
    backend: BackendName | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """GELU(x + bias) (Hendrycks & Gimpel 2016): exact by erf, or ``approximate="tanh"``.

    Args:
        x: (..., width).
        bias: (width,), any float dtype: the bias of the linear layer that made x, folded in.
        out: written and returned; may be ``x``; inference alone.

    Returns:
        x's shape and dtype.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        BackendUnavailableError: the backend asked for cannot run this.
    """
    check_tensors(("x", x), bias=bias)
    width = x.shape[-1:]
    if not (width and width[0] >= 1 and (bias is None or bias.shape == width)):
        check(x.ndim >= 1 and x.shape[-1] >= 1, f"x must be (..., width), not {shape_of(x)}")
        check_vector("bias", bias, x.shape[-1])
    check_approximate(approximate)
    return checked_gelu(x, bias, approximate, backend, out)


def checked_gelu(x, bias, approximate, backend, out):
    """:func:`gelu`, of arguments that fit."""
    needs_grad = needs_grad_of(x, bias)
    name = backends.choose("gelu", x.device, x.dtype, needs_grad, backend)
    if out is not None:
        check_out(out, x, needs_grad)
    if name == "eager":
        result = reference.gelu(x, None if bias is None else bias.to(x.dtype), approximate)
        return result if out is None else out.copy_(result)
    if out is not None:
        return backends.module(name).gelu_forward(x.contiguous(), bias, approximate, out=out)
    return call("gelu", needs_grad, x, bias, approximate, name)


@define("gelu(Tensor x, Tensor? bias, str approximate, str backend) -> Tensor")
def _gelu(x, bias, approximate, backend):
    return backends.module(backend).gelu_forward(x.contiguous(), bias, approximate)


@define(
    "gelu_backward(Tensor dout, Tensor x, Tensor? bias, str approximate, str backend) "
    "-> (Tensor, Tensor)",
    absent=(None, torch.float32),
)
def _gelu_backward(dout, x, bias, approximate, backend):
    return backends.module(backend).gelu_backward(
        dout.contiguous(), x.contiguous(), bias, approximate
    )


@fake("gelu")
def _(x, bias, approximate, backend):
    return contiguous_like(x)


@fake("gelu_backward")
def _(dout, x, bias, approximate, backend):
    width = 0 if bias is None else x.shape[-1]
    return contiguous_like(x), x.new_empty((width,), dtype=torch.float32)


def _save_gelu(ctx, inputs, output):
    x, bias, ctx.approximate, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _gelu_autograd(ctx, dout):
    x, bias = ctx.saved_tensors
    dx, dbias = call_backward("gelu_backward", dout, x, bias, ctx.approximate, ctx.backend)
    return dx, None if bias is None else dbias.to(bias.dtype), None, None


register_autograd("gelu", _gelu_autograd, _save_gelu)
refuse_second_derivative("gelu_backward")
register_autocast("gelu", 0)
