"""A linear layer and the GELU after it; weights prepared for repeated inference."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast import backends
from bert_fast.backends import BackendName
from bert_fast.ops.checks import (
    Approximate,
    check,
    check_approximate,
    check_out,
    check_same_dtype,
    check_tensors,
    check_vector,
    shape_of,
)
from bert_fast.ops.gelu import checked_gelu
from bert_fast.ops.library import (
    autocast,
    call,
    call_backward,
    define,
    fake,
    needs_grad_of,
    register_autocast,
    register_autograd,
)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: Approximate = "none",
    backend: BackendName | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """GELU(x Wᵀ + bias): a linear layer and the activation after it.

    One kernel where the backend has one and it is known to win (see :mod:`bert_fast.backends`), or
    was asked for by name; else torch's product and :func:`gelu`.

    Args:
        x: (..., width).
        weight: (out_width, width), x's dtype.
        bias: (out_width,), any float dtype.
        approximate, backend: as in :func:`gelu`.
        out: (..., out_width), written and returned; inference alone.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        BackendUnavailableError: the backend asked for cannot run this.
    """
    check_tensors(("x", x), weight=weight, bias=bias)
    x, weight = autocast(x, weight)
    width, shape = x.shape[-1:], weight.shape
    if not (
        width and width[0] >= 1 and x.dtype == weight.dtype and len(shape) == 2 and shape[0] >= 1
        and shape[1] == width[0] and (bias is None or bias.shape == shape[:1])
    ):  # fmt: skip
        check(x.ndim >= 1 and x.shape[-1] >= 1, f"x must be (..., width), not {shape_of(x)}")
        check_same_dtype(("x", x), weight=weight)
        check(
            weight.ndim == 2 and weight.shape[0] >= 1 and weight.shape[1] == x.shape[-1],
            f"weight must be (out_width, {x.shape[-1]}), not {shape_of(weight)}",
        )
        check_vector("bias", bias, weight.shape[0])
    check_approximate(approximate)
    needs_grad = needs_grad_of(x, weight, bias)
    name = backends.choose("linear_gelu", x.device, x.dtype, needs_grad, backend)
    if out is not None:
        like = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device="meta")
        check_out(out, like, needs_grad, x.device)
    if name != "eager":
        args = x, weight, bias, approximate, needs_grad, name
        result, _ = call("linear_gelu", needs_grad, *args)
        return result if out is None else out.copy_(result)
    if out is None:
        return checked_gelu(F.linear(x, weight), bias, approximate, backend, None)
    product = torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out=out.view(-1, weight.shape[0]))
    return checked_gelu(product, bias, approximate, backend, product).view(out.shape)


def pack_weight(weight, precision="float32", x_factor=None):
    """A linear layer's weight prepared for repeated inference, or None where nothing is won by it:
    see :class:`bert_fast.backends.cpu.PackedWeight`."""
    if backends.why_unavailable("cpu") is not None:
        return None
    packed = backends.module("cpu").PackedWeight
    return packed(weight, precision, x_factor) if packed.possible(weight) else None


def unpacked_weight(elements, scale=None, x_factor=None):
    """A packed weight made of what one was made of: its float weight is not needed."""
    return backends.module("cpu").PackedWeight.of_elements(elements, scale, x_factor)


def why_not_packed():
    """Why no weights can be packed here, or None."""
    return backends.why_unavailable("cpu")


def is_fast(precision):
    """Whether this processor has an instruction for products of this precision."""
    return backends.why_unavailable("cpu") is None and backends.module("cpu").is_fast(precision)


def can_use_packed(packed, weight):
    """Whether a product goes through a packed weight: of a weight that is still of the right kind
    and shape, and no other backend asked for."""
    if not (weight.is_meta if packed.released else packed.possible(weight)):
        return False
    if weight.shape != packed.shape:
        return False
    return backends.choose("gelu", "cpu", weight.dtype, needs_grad=False) == "cpu"


@define(
    "linear_gelu(Tensor x, Tensor weight, Tensor? bias, str approximate, bool training, "
    "str backend) -> (Tensor, Tensor)",
    absent=(None, None),
)
def _linear_gelu(x, weight, bias, approximate, training, backend):
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out, product = backends.module(backend).linear_gelu_forward(
        rows, weight.contiguous(), bias, approximate, training
    )
    out = out.view(*x.shape[:-1], weight.shape[0])
    return out, None if product is None else product.view_as(out)


@fake("linear_gelu")
def _(x, weight, bias, approximate, training, backend):
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return out, x.new_empty(out.shape if training else (0,))


def _save_linear_gelu(ctx, inputs, output):
    x, weight, bias, ctx.approximate, _, ctx.backend = inputs
    _, product = output
    ctx.mark_non_differentiable(product)
    ctx.save_for_backward(x, weight, bias, product)


def _linear_gelu_autograd(ctx, dout, _):
    x, weight, bias, product = ctx.saved_tensors
    dproduct, dbias = call_backward(
        "gelu_backward", dout, product, bias, ctx.approximate, ctx.backend
    )
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    dx = dproduct @ weight if needs_x else None
    dweight = None
    if needs_weight:
        dweight = dproduct.reshape(-1, dproduct.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return dx, dweight, None if bias is None else dbias.to(bias.dtype), None, None, None


register_autograd("linear_gelu", _linear_gelu_autograd, _save_linear_gelu)
register_autocast("linear_gelu", 2)
