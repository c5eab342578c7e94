"""Layer-norm with what stands before it: bias, dropout and residual."""

import torch
from torch import Tensor

from bert_fast import backends
from bert_fast.backends import BackendName
from bert_fast.ops import reference
from bert_fast.ops.checks import (
    check,
    check_dropout,
    check_out,
    check_same_dtype,
    check_tensors,
    check_vector,
    shape_of,
)
from bert_fast.ops.library import (
    autocast,
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


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, residual: Tensor | None = None,
    linear_bias: Tensor | None = None, eps: float = 1e-12, dropout_p: float = 0.0,
    seed: int | Tensor | None = None, backend: BackendName | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """LN(residual + dropout(x + linear_bias)) · weight + bias (Ba et al. 2016, eq. 4), one pass.

    Args:
        x: (..., hidden).
        weight, bias: (hidden,), any float dtype.
        residual: x's shape and dtype.
        linear_bias: (hidden,), the bias of the linear layer that made x, folded in.
        eps: added to the variance. BERT's own default, 1e-12.
        dropout_p, seed, backend: as in :func:`attention`.
        out: written and returned; may be ``x`` or ``residual``; inference alone.

    Returns:
        x's shape and dtype; statistics and sums are fp32 inside.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        BackendUnavailableError: the backend asked for cannot run this.
    """
    check_tensors(("x", x), weight=weight, bias=bias, residual=residual, linear_bias=linear_bias)
    x, residual = autocast(x, residual)
    shape, width = x.shape, x.shape[-1:]
    if not (
        width and width[0] >= 1 and weight.shape == width and bias.shape == width
        and (linear_bias is None or linear_bias.shape == width)
        and (residual is None or (residual.dtype == x.dtype and residual.shape == shape))
    ):  # fmt: skip
        check(x.ndim >= 1 and x.shape[-1] >= 1, f"x must be (..., hidden), not {shape_of(x)}")
        check_same_dtype(("x", x), residual=residual)
        check_vector("weight", weight, x.shape[-1])
        check_vector("bias", bias, x.shape[-1])
        check_vector("linear_bias", linear_bias, x.shape[-1])
        check(
            residual is None or residual.shape == x.shape,
            lambda: f"residual must have x's shape {shape_of(x)}, not {shape_of(residual)}",
        )
    eps, dropout_p = float(eps), float(dropout_p)
    seed = check_dropout(dropout_p, seed, x.device)
    needs_grad = needs_grad_of(x, weight, bias, residual, linear_bias)
    name = backends.choose("layer_norm", x.device, x.dtype, needs_grad, backend, width[0])
    if out is not None:
        check_out(out, x, needs_grad)
    if name == "eager":
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(x.dtype)
        result = reference.layer_norm(x, weight, bias, residual, linear_bias, eps, dropout_p, seed)
        return result if out is None else out.copy_(result)
    if out is not None:
        residual = None if residual is None else residual.contiguous()
        return backends.module(name).layer_norm_forward(
            x.contiguous(), weight, bias, residual, linear_bias, eps, dropout_p, seed,
            out=out, training=False,
        )[0]  # fmt: skip
    return call(
        "layer_norm", needs_grad, x, residual, weight, bias, linear_bias, eps, dropout_p, seed,
        name, needs_grad,
    )[0]  # fmt: skip


@define(
    "layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor? linear_bias, "
    "float eps, float dropout_p, Tensor? seed, str backend, bool training=True) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    absent=(None, None, torch.float32, torch.float32),
)
def _layer_norm(
    x, residual, weight, bias, linear_bias, eps, dropout_p, seed, backend, training=True
):
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    # No output of an op may be one of its inputs: where x itself was normalised, nothing is kept.
    return backends.module(backend).layer_norm_forward(
        x, weight, bias, residual, linear_bias, eps, dropout_p, seed, training=training
    )


@define(
    "layer_norm_backward(Tensor dout, Tensor total, Tensor mean, Tensor rstd, Tensor weight, "
    "bool has_linear_bias, float dropout_p, Tensor? seed, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    absent=(None, None, torch.float32, torch.float32, torch.float32),
)
def _layer_norm_backward(dout, total, mean, rstd, weight, *options):
    *options, backend = options
    return backends.module(backend).layer_norm_backward(
        dout.contiguous(), total.contiguous(), mean, rstd, weight, *options
    )


@fake("layer_norm")
def _(x, residual, weight, bias, linear_bias, eps, dropout_p, seed, backend, training=True):
    is_x = residual is None and linear_bias is None and dropout_p == 0
    rows = x.numel() // x.shape[-1] if training else 0
    statistics = [x.new_empty((rows,), dtype=torch.float32) for _ in range(2)]
    total = x.new_empty((0,) if is_x or not training else x.shape)
    return contiguous_like(x), total, *statistics


@fake("layer_norm_backward")
def _(dout, total, mean, rstd, weight, has_linear_bias, dropout_p, seed, backend):
    hidden = total.shape[-1]
    sums = [total.new_empty((hidden,), dtype=torch.float32) for _ in range(2)]
    dlinear_bias = total.new_empty((hidden if has_linear_bias else 0,), dtype=torch.float32)
    dx = total.new_empty((0,) if dropout_p == 0 else total.shape)
    return dx, contiguous_like(total), *sums, dlinear_bias


def _save_layer_norm(ctx, inputs, output):
    x, residual, weight, bias, linear_bias, _, ctx.dropout_p, seed, ctx.backend, *rest = inputs
    _, total, mean, rstd = output
    if rest and not rest[0]:
        raise RuntimeError(
            "layer_norm was traced for inference, where it keeps nothing for backward: trace it "
            "with gradients"
        )
    ctx.mark_non_differentiable(*(t for t in (total, mean, rstd) if t is not None))
    is_x = residual is None and linear_bias is None and ctx.dropout_p == 0
    ctx.save_for_backward(x if is_x else total, mean, rstd, weight, seed)
    ctx.has_residual = residual is not None
    ctx.bias_dtype = bias.dtype
    ctx.linear_bias_dtype = None if linear_bias is None else linear_bias.dtype


def _layer_norm_autograd(ctx, dout, *_):
    total, mean, rstd, weight, seed = ctx.saved_tensors
    has_linear_bias = ctx.linear_bias_dtype is not None
    dx, dresidual, dweight, dbias, dlinear_bias = call_backward(
        "layer_norm_backward", dout, total, mean, rstd, weight, has_linear_bias, ctx.dropout_p,
        seed, ctx.backend,
    )  # fmt: skip
    return (
        dresidual if ctx.dropout_p == 0 else dx,
        dresidual if ctx.has_residual else None,
        dweight.to(weight.dtype),
        dbias.to(ctx.bias_dtype),
        dlinear_bias.to(ctx.linear_bias_dtype) if has_linear_bias else None,
        *[None] * 5,
    )


register_autograd("layer_norm", _layer_norm_autograd, _save_layer_norm)
refuse_second_derivative("layer_norm_backward")
register_autocast("layer_norm", 2)
