"""Attention over packed sequences: softmax(Q Kᵀ · scale) V, forward and backward."""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from bert_fast import backends
from bert_fast.backends import BackendName
from bert_fast.ops import reference
from bert_fast.ops.checks import (
    check,
    check_cu_seqlens,
    check_dropout,
    check_out,
    check_same_dtype,
    check_tensors,
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
    rows_contiguous,
)


@overload
def attention(*args: Any, return_lse: Literal[True], **options: Any) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None = None, *,
    max_seqlen: int | None = None, max_seqlen_k: int | None = None, bias: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, dropout_p: float = 0.0,
    seed: int | Tensor | None = None, padded_tail: bool = False, return_lse: Literal[False] = False,
    backend: BackendName | None = None, out: Tensor | None = None,
    position_bias: Tensor | None = None, precision: Literal["float32", "bfloat16"] = "float32",
) -> Tensor: ...  # fmt: skip
def attention(
    q, k, v, cu_seqlens, cu_seqlens_k=None, *, max_seqlen=None, max_seqlen_k=None, bias=None,
    softmax_scale=None, causal=False, dropout_p=0.0, seed=None, padded_tail=False,
    return_lse=False, backend=None, out=None, position_bias=None, precision="float32",
):  # fmt: skip
    """softmax(Q Kᵀ · softmax_scale + position_bias) V over packed sequences (Vaswani et al. 2017).

    Args:
        q: (total_tokens, num_heads, head_dim), the tokens of all sequences one after another.
        k, v: (total_tokens_k, num_heads, head_dim). Any strides; only a last dimension that is
            not contiguous is copied. float32, bfloat16 or float16 (float64: eager).
        cu_seqlens: int32 (batch + 1,), on the tokens' device: sequence i is the rows
            ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``. Sequences may be empty.
        cu_seqlens_k: the same for k and v (cross-attention). Default: ``cu_seqlens``.
        max_seqlen, max_seqlen_k: at least the longest sequence. Found from ``cu_seqlens`` when it
            is on the CPU; on a device, where looking would mean waiting, default the token count.
            One that is too small is an error; on a device the kernel that relies on it stops, as
            CUDA's assertions do: an error of a later call, after which the process has to end.
        bias: (3, num_heads, head_dim), added to q, k and v: the projection's bias, folded in.
        softmax_scale: default 1/√head_dim.
        causal: query i of a sequence sees keys up to i + len_k - len_q (the last sees all).
        dropout_p: probability that a weight is zeroed (the others are scaled by 1/(1 - p)), taken
            to the nearest 65536th: at least one, and not all.
        seed: int or int64 tensor that, with a weight's position, decides its fate; default: drawn
            from torch's generator.
        padded_tail: rows past the last sequence are allowed, and come out as zeros.
        return_lse: also return the log-sum-exp of the scores, fp32 (num_heads, total_tokens),
            without gradient.
        backend: "auto", "eager", "cpu", "triton" or "cuda"; see :mod:`bert_fast.backends`.
        out: written and returned; inference alone.
        position_bias: (num_heads, at least max_seqlen, at least max_seqlen_k), any float dtype:
            entry (h, i, j) is added to head h's score, after the scale, of every sequence's query i
            and key j. What lies past max_seqlen is ignored, with zero gradient; -inf hides a key.
        precision: what the factors of the two products are rounded to, "float32" or "bfloat16":
            of float32 tensors, in inference on the ``cpu`` backend. Sums and softmax are float32
            either way. A processor that has no product in bfloat16 multiplies in float32.

    Returns:
        (total_tokens, num_heads, head_dim); with ``return_lse`` the pair (out, lse). A row that
        sees no key is zero.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        BackendUnavailableError: the backend asked for cannot run this.
    """
    check_tensors(("q", q), k=k, v=v, bias=bias, position_bias=position_bias)
    q, k, v = autocast(q, k, v)
    check_same_dtype(("q", q), k=k, v=v)
    check(q.ndim == 3, lambda: f"q must be (total_tokens, num_heads, head_dim), not {shape_of(q)}")
    check(
        k.ndim == 3 and k.shape[1:] == q.shape[1:],
        lambda: f"k must be (total_tokens_k, {q.shape[1]}, {q.shape[2]}), not {shape_of(k)}",
    )
    check(v.shape == k.shape, lambda: f"v must have k's shape {shape_of(k)}, not {shape_of(v)}")
    if cu_seqlens_k is None:
        check(
            k.shape[0] == q.shape[0] or padded_tail,
            lambda: (
                f"k has {k.shape[0]} tokens and q {q.shape[0]}: "
                "cu_seqlens_k must say how k's divide"
            ),
        )
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen_k or max_seqlen
    return _run_attention(
        (q, k, v), "attention", cu_seqlens, cu_seqlens_k,
        max_seqlen, max_seqlen_k, bias, softmax_scale, causal, dropout_p, seed, padded_tail,
        return_lse, backend, out, position_bias, precision,
    )  # fmt: skip


@overload
def attention_qkv(
    *args: Any, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_qkv(
    qkv: Tensor, cu_seqlens: Tensor, *, max_seqlen: int | None = None, bias: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, dropout_p: float = 0.0,
    seed: int | Tensor | None = None, padded_tail: bool = False, return_lse: Literal[False] = False,
    backend: BackendName | None = None, out: Tensor | None = None,
    position_bias: Tensor | None = None, precision: Literal["float32", "bfloat16"] = "float32",
) -> Tensor: ...  # fmt: skip
def attention_qkv(
    qkv, cu_seqlens, *, max_seqlen=None, bias=None, softmax_scale=None, causal=False,
    dropout_p=0.0, seed=None, padded_tail=False, return_lse=False, backend=None, out=None,
    position_bias=None, precision="float32",
):  # fmt: skip
    """:func:`attention` of one fused projection, (total_tokens, 3, num_heads, head_dim), read by
    strides and never copied; its gradient is one tensor of the same shape."""
    check_tensors(("qkv", qkv), bias=bias, position_bias=position_bias)
    (qkv,) = autocast(qkv)
    check(
        qkv.ndim == 4 and qkv.shape[1] == 3,
        lambda: f"qkv must be (total_tokens, 3, num_heads, head_dim), not {shape_of(qkv)}",
    )
    return _run_attention(
        (qkv,), "attention_qkv", cu_seqlens, cu_seqlens, max_seqlen,
        max_seqlen, bias, softmax_scale, causal, dropout_p, seed, padded_tail, return_lse,
        backend, out, position_bias, precision,
    )  # fmt: skip


def _run_attention(
    tensors, op, cu_q, cu_k, max_q, max_k, bias, softmax_scale, causal, dropout_p,
    seed, padded_tail, return_lse, backend, out, position_bias, precision,
):  # fmt: skip
    q, k = tensors[0], tensors[:2][-1]  # or both qkv: what is asked of them it has, too
    num_heads, head_dim = q.shape[-2:]
    check(head_dim >= 1, "q must have a head_dim of at least 1")
    check(
        bias is None or bias.shape == (3, num_heads, head_dim),
        lambda: f"bias must be (3, {num_heads}, {head_dim}), not {shape_of(bias)}",
    )
    same = cu_k is cu_q
    max_q = check_cu_seqlens("cu_seqlens", cu_q, q.shape[0], q.device, max_q, padded_tail)
    if same:
        max_k = max_q
    else:
        max_k = check_cu_seqlens("cu_seqlens_k", cu_k, k.shape[0], q.device, max_k, padded_tail)
    check(
        cu_k.shape == cu_q.shape,
        lambda: f"cu_seqlens_k has {cu_k.numel() - 1} sequences, cu_seqlens {cu_q.numel() - 1}",
    )
    dropout_p = float(dropout_p)
    seed = check_dropout(dropout_p, seed, q.device)
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else float(softmax_scale)
    check(math.isfinite(scale), lambda: f"softmax_scale must be finite, not {softmax_scale}")
    if position_bias is not None:
        check(
            position_bias.ndim == 3
            and position_bias.shape[0] == num_heads
            and position_bias.shape[1] >= max_q
            and position_bias.shape[2] >= max_k,
            lambda: (
                f"position_bias must be ({num_heads}, at least {max_q}, at least {max_k}), "
                f"not {shape_of(position_bias)}"
            ),
        )
    needs_grad = needs_grad_of(*tensors, bias, position_bias)
    name = backends.choose("attention", q.device, q.dtype, needs_grad, backend, head_dim)
    if precision != "float32":
        _check_precision(precision, name, tensors, needs_grad, dropout_p)
    if out is not None or name == "eager":
        tensors = tensors if len(tensors) > 1 else q.unbind(1)
    if out is not None:
        check_out(out, tensors[0], needs_grad)
    options = (cu_q, cu_k, max_q, max_k, bias, scale, causal, dropout_p, seed)
    if name == "eager":
        if bias is not None:
            bias = bias.to(q.dtype)
        if position_bias is not None:
            position_bias = position_bias.to(q.dtype)
        result, lse = reference.attention(*tensors, *options[:4], bias, *options[5:], position_bias)
        if out is not None:
            result = out.copy_(result)
    elif out is not None:
        options = (*options, name, position_bias, precision)
        result, lse = _attention_forward(*map(rows_contiguous, tensors), options, out=out)
    else:
        result, lse = call(op, needs_grad, *tensors, *options, name, position_bias, precision)
    return (result, lse) if return_lse else result


def _check_precision(precision, name, tensors, needs_grad, dropout_p):
    dtype = tensors[0].dtype
    check(
        precision == "bfloat16",
        lambda: f"precision must be 'float32' or 'bfloat16', not {precision!r}",
    )
    check(
        name == "cpu" and dtype == torch.float32 and not needs_grad and dropout_p == 0.0,
        lambda: (
            "precision 'bfloat16' is for float32 tensors in inference, without dropout, on the "
            f"cpu backend; not for {dtype} on {name}{', with gradients' if needs_grad else ''}"
            f"{', dropout' if dropout_p else ''}"
        ),
    )


_ATTENTION_OPTIONS = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "Tensor? bias, float softmax_scale, bool causal, float dropout_p, Tensor? seed, str backend, "
    "Tensor? position_bias=None"
)
_FORWARD_OPTIONS = f'{_ATTENTION_OPTIONS}, str precision="float32"'
# The last output is position_bias's gradient, float32; of no elements where it is not asked for.
_BACKWARD_OPTIONS = f"{_ATTENTION_OPTIONS}, bool position_bias_grad=False"


def _attention_forward(q, k, v, options, **keywords):
    """Runs the kernels; options as in the schema, whose defaults torch leaves out."""
    *options, name, position_bias, precision = (*options, None, None)[:12]
    if position_bias is not None:
        keywords["position_bias"] = position_bias
    if precision not in (None, "float32"):
        keywords["precision"] = precision
    return backends.module(name).attention_forward(q, k, v, *options, **keywords)


def _run_backward(tensors, options, gradients):
    """Writes the gradients of q, k and v; returns position_bias's."""
    *options, name, position_bias, wanted = (*options, None, None)[:12]
    position, dposition_bias = {}, None
    if wanted:
        dposition_bias = position_bias.new_empty(position_bias.shape, dtype=torch.float32)
        position["dposition_bias"] = dposition_bias
    if position_bias is not None:
        position["position_bias"] = position_bias
    backends.module(name).attention_backward(*tensors, *options, *gradients, **position)
    return dposition_bias


@define(f"attention(Tensor q, Tensor k, Tensor v, {_FORWARD_OPTIONS}) -> (Tensor, Tensor)")
def _attention(q, k, v, *options):
    return _attention_forward(*map(rows_contiguous, (q, k, v)), options)


@define(f"attention_qkv(Tensor qkv, {_FORWARD_OPTIONS}) -> (Tensor, Tensor)")
def _attention_qkv(qkv, *options):
    return _attention_forward(*rows_contiguous(qkv).unbind(1), options)


@define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_BACKWARD_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    absent=(None, None, None, torch.float32),
)
def _attention_backward(dout, q, k, v, out, lse, *options):
    dout, q, k, v = map(rows_contiguous, (dout, q, k, v))
    gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    return *gradients, _run_backward((dout, q, k, v, out, lse), options, gradients)


@define(
    "attention_qkv_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, "
    f"{_BACKWARD_OPTIONS}) -> (Tensor, Tensor)",
    absent=(None, torch.float32),
)
def _attention_qkv_backward(dout, qkv, out, lse, *options):
    dout, qkv = rows_contiguous(dout), rows_contiguous(qkv)
    dqkv = qkv.new_empty(qkv.shape)
    tensors = (dout, *qkv.unbind(1), out, lse)
    return dqkv, _run_backward(tensors, options, dqkv.unbind(1))


@fake("attention")
def _(q, k, v, *options):
    return contiguous_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@fake("attention_qkv")
def _(qkv, *options):
    total, _, num_heads, head_dim = qkv.shape
    out = qkv.new_empty((total, num_heads, head_dim))
    return out, qkv.new_empty((num_heads, total), dtype=torch.float32)


def _fake_dposition_bias(lse, position_bias=None, wanted=False):
    return lse.new_empty(position_bias.shape if wanted else 0)


@fake("attention_backward")
def _(dout, q, k, v, out, lse, *options):
    position = _fake_dposition_bias(lse, *options[10:])
    return contiguous_like(q), contiguous_like(k), contiguous_like(v), position


@fake("attention_qkv_backward")
def _(dout, qkv, out, lse, *options):
    return contiguous_like(qkv), _fake_dposition_bias(lse, *options[10:])


# Of the options, in the schema's order: cu_q, cu_k, bias, seed, position_bias.
_TENSOR_OPTIONS = (0, 1, 4, 8, 10)


def _save_attention(ctx, inputs, output):
    tensors, options = inputs[:-12], list(inputs[-12:-1])  # with gradients the last is float32
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse, *(options[i] for i in _TENSOR_OPTIONS))
    ctx.options = options


def _differentiate(ctx, dout, backward):
    """``backward``'s gradients of q, k and v, or of qkv; then those of the options."""
    saved, options = ctx.saved_tensors, list(ctx.options)
    tensors = saved[: -len(_TENSOR_OPTIONS)]
    for i, tensor in zip(_TENSOR_OPTIONS, saved[len(tensors) :], strict=True):
        options[i] = tensor
    bias, position_bias = options[4], options[10]
    needed = ctx.needs_input_grad[len(tensors) - 2 :]  # without the options left at their defaults
    wanted = position_bias is not None and needed[10]
    *gradients, dposition_bias = call_backward(backward, dout, *tensors, *options, wanted)
    of_options = [None] * 12
    if bias is not None and needed[4]:
        sums = [g.sum(0, dtype=torch.float32) for g in gradients]
        of_options[4] = (torch.stack(sums) if len(sums) > 1 else sums[0]).to(bias.dtype)
    if wanted:
        of_options[10] = dposition_bias.to(position_bias.dtype)
    return *gradients, *of_options


def _attention_autograd(ctx, dout, dlse):
    return _differentiate(ctx, dout, "attention_backward")


def _attention_qkv_autograd(ctx, dout, dlse):
    return _differentiate(ctx, dout, "attention_qkv_backward")


register_autograd("attention", _attention_autograd, _save_attention)
refuse_second_derivative("attention_backward")
register_autocast("attention", 3)
register_autograd("attention_qkv", _attention_qkv_autograd, _save_attention)
refuse_second_derivative("attention_qkv_backward")
register_autocast("attention_qkv", 1)
