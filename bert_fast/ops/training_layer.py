"""An encoder layer in training on a GPU, as one node of autograd's graph.

Op by op a layer is some twenty nodes. For small batches the host takes longer to make them, and to
go back through them, than the kernels take; and where a gradient comes from two of them, a kernel
of its own adds the two, which here the product that makes one of them does.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bert_fast import backends
from bert_fast.ops.library import is_unseen, needs_grad_of, refused


class Numbers(NamedTuple):
    """What a layer computes with beside its tensors."""

    num_heads: int
    head_dim: int
    causal: bool
    approximate: str
    eps: float  # of the norm after attention
    last_eps: float
    dropout: tuple  # probabilities: of attention's weights, after the output and the down product


class Seeds:
    """Dropout's seeds, those of so many layers drawn by one launch."""

    def __init__(self, layers):
        self.layers, self.left = layers, {}

    def draw(self, device):
        """Three, for a layer on that device: each (2,) int64, of which one is read, so that each
        lies at a multiple of 16 bytes."""
        left = self.left.get(device)
        if not left:
            left = torch.randint(2**62, (3 * self.layers, 2), dtype=torch.int64, device=device)
            left = self.left[device] = list(left.unbind())
        drawn, self.left[device] = left[:3], left[3:]
        return drawn


def training_layer(x, cu_seqlens, max_seqlen, numbers, qkv, rest, seeds=None):
    """LN(y + drop(GELU(y Wᵤᵀ + bᵤ) W_dᵀ + b_d)), where y = LN(x + drop(attention(x) W_oᵀ + b_o)).

    Args:
        x: (total_tokens, hidden), contiguous.
        cu_seqlens, max_seqlen: as in :func:`attention`; they are not looked at.
        numbers: the layer's :class:`Numbers`.
        qkv: (weight, bias) of the product that makes q, k and v, or of one for each.
        rest: of the output product, norm, up, down and last norm.
        seeds: a :class:`Seeds` that several layers have, or None: a layer's own are drawn.

    Returns:
        (total_tokens, hidden), under autocast in its dtype; None where the layer has to be run op
        by op: with neither gradients nor dropout, in other dtypes, on backends without these
        kernels, where somebody looks on.
    """
    pairs = [*qkv, *rest]
    tensors = [tensor for pair in pairs for tensor in pair]
    # What drops out does so from the same seeds without gradients: GradCache's losses and reentrant
    # checkpointing run a layer in both ways, and count on the same masks.
    if not (any(numbers.dropout) or needs_grad_of(x, *tensors)) or not is_unseen((x, *tensors)):
        return None
    dtype, device = x.dtype, x.device.type
    cast = torch.is_autocast_enabled(device)
    if cast and any(t.dtype == torch.float64 for t in (x, *tensors)):
        return None
    if not _fits(x, numbers, qkv, rest):
        return None
    if cast:
        dtype = torch.get_autocast_dtype(device)
    else:
        multiplied = [*itertools.chain.from_iterable(qkv), rest[0][0], rest[2][0], rest[3][0]]
        if any(t.dtype != dtype for t in multiplied):
            return None
    names = [
        backends.choose(op, x.device, dtype, True, None, size)
        for op, size in (
            ("attention", numbers.head_dim), ("layer_norm", x.shape[1]), ("gelu", 0),
            ("linear_gelu", 0),
        )
    ]  # fmt: skip
    if names.pop() != "eager" or not set(names) <= {"triton", "cuda"}:
        return None
    drawn = (None,) * 3
    if any(numbers.dropout):
        drawn = (Seeds(1) if seeds is None else seeds).draw(x.device)
        drawn = tuple(s if p else None for s, p in zip(drawn, numbers.dropout, strict=True))
    return _Layer.apply(x, (dtype, cast, cu_seqlens, max_seqlen, numbers, names, drawn), *tensors)


def _fits(x, numbers, qkv, rest):
    """Whether all is as the kernels take it; where it is not, the ops say what."""
    if not x.is_contiguous() or not all(0 <= p < 1 for p in numbers.dropout):
        return False
    (_, hidden), inner, device = x.shape, rest[2][0].shape[0], x.device
    rows = 3 * hidden // len(qkv)
    shapes = [
        *[(rows, hidden), (rows,)] * len(qkv), (hidden, hidden), *[(hidden,)] * 3, (inner, hidden),
        (inner,), (hidden, inner), *[(hidden,)] * 3,
    ]  # fmt: skip
    tensors = itertools.chain.from_iterable((*qkv, *rest))
    return numbers.num_heads * numbers.head_dim == hidden and all(
        t.shape == shape and t.device == device and t.dtype.is_floating_point
        for t, shape in zip(tensors, shapes, strict=True)
    )


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, settings, *tensors):
        dtype, cast, cu_seqlens, longest, numbers, names, seeds = settings
        attention, norm, gelu = map(backends.module, names)
        *qkv, out, first, up, down, last = zip(tensors[::2], tensors[1::2], strict=True)
        weight, bias = qkv[0] if len(qkv) == 1 else map(torch.cat, zip(*qkv, strict=True))
        given, multiplied = x.dtype, (x, weight, bias, out[0], up[0], down[0])
        if cast:
            multiplied = (t.to(dtype) for t in multiplied)
        x, weight, bias, out_weight, up_weight, down_weight = multiplied
        tokens, (p_attention, p_out, p_down) = len(x), numbers.dropout
        options = (
            cu_seqlens, cu_seqlens, longest, longest, None, 1.0 / math.sqrt(numbers.head_dim),
            numbers.causal, p_attention, seeds[0],
        )  # fmt: skip
        projected = F.linear(x, weight, bias)
        heads = projected.view(tokens, 3, numbers.num_heads, numbers.head_dim).unbind(1)
        context, lse = attention.attention_forward(*heads, *options)
        y, *of_norm = norm.layer_norm_forward(
            F.linear(context.flatten(1), out_weight), *first, x, out[1], numbers.eps, p_out,
            seeds[1],
        )  # fmt: skip
        hidden = F.linear(y, up_weight)
        active = gelu.gelu_forward(hidden, up[1], numbers.approximate)
        result, *of_last = norm.layer_norm_forward(
            F.linear(active, down_weight), *last, y, down[1], numbers.last_eps, p_down, seeds[2]
        )
        ctx.save_for_backward(
            x, projected, context, lse, y, hidden, active, *of_norm, *of_last, cu_seqlens, *seeds,
            weight, out_weight, up_weight, down_weight, first[0], up[1], last[0],
        )  # fmt: skip
        ctx.settings = longest, numbers, names
        ctx.dtypes = given, [t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    def backward(ctx, dout):
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        graphed = torch.is_grad_enabled()  # a graph of this is wanted
        if not graphed and not torch._C._is_any_autocast_enabled():
            return _gradients(ctx, dout)
        with torch.no_grad(), torch.autocast(dout.device.type, enabled=False):
            found = _gradients(ctx, dout)
        return refused(found) if graphed else found


def _gradients(ctx, dout):
    longest, numbers, names = ctx.settings
    attention, norm, gelu = map(backends.module, names)
    x, projected, context, lse, y, hidden, active, *saved = ctx.saved_tensors
    of_norm, of_last, (cu_seqlens, *seeds), parameters = (
        saved[:3], saved[3:6], saved[6:10], saved[10:]
    )  # fmt: skip
    weight, out_weight, up_weight, down_weight, gain, up_bias, last_gain = parameters
    tokens, (p_attention, p_out, p_down) = len(x), numbers.dropout
    needs_x, _, *needed = ctx.needs_input_grad
    x_dtype, dtypes = ctx.dtypes
    products = len(dtypes) // 2 - 5  # that make q, k and v
    of_weights, of_vectors = needed[::2], needed[1::2]
    rows = len(weight) // products

    def dweight(dout, x, place):
        return dout.t() @ x if of_weights[place] else None

    def of_each(tensor):  # of q, k and v: to autograd a tensor of its own
        return (tensor,) if products == 1 else torch.unsafe_split(tensor, rows)

    ddown, dy, of_last_sums = norm.layer_norm_backward(
        dout.contiguous(), *of_last, last_gain, True, p_down, seeds[2], partial=True
    )
    ddown = dy if ddown is None else ddown
    ddown_weight = dweight(ddown, active, -2)
    dhidden, of_up_bias = gelu.gelu_backward(
        ddown @ down_weight, hidden, up_bias, numbers.approximate, partial=True
    )
    dup_weight = dweight(dhidden, y, -3)
    dy.addmm_(dhidden, up_weight)
    dout, dx, of_first_sums = norm.layer_norm_backward(
        dy, *of_norm, gain, True, p_out, seeds[1], partial=True
    )
    dout = dx if dout is None else dout
    dout_weight = dweight(dout, context.flatten(1), -5)
    dprojected = torch.empty_like(projected)
    heads = tokens, 3, numbers.num_heads, numbers.head_dim
    attention.attention_backward(
        (dout @ out_weight).view_as(context), *projected.view(heads).unbind(1), context, lse,
        cu_seqlens, cu_seqlens, longest, longest, None, 1.0 / math.sqrt(numbers.head_dim),
        numbers.causal, p_attention, seeds[0], *dprojected.view(heads).unbind(1),
    )  # fmt: skip
    if needs_x:
        dx.addmm_(dprojected, weight)
    if all(of_weights[:products]):
        dweights = of_each(dprojected.t() @ x)
    else:
        parts = enumerate(dprojected.split(rows, 1))
        dweights = [d.t() @ x if of_weights[i] else None for i, d in parts]
    # All sums over rows by one kernel: where all gradients have one dtype, in it.
    kinds = [of_last_sums, of_up_bias, of_first_sums]
    if any(of_vectors[:products]):
        kinds.append(attention.column_partials(dprojected))
    of_sums = {*dtypes[1::2], dtypes[-2], dtypes[-8]}
    dtype = dtypes[-1] if len(of_sums) == 1 else torch.float32
    (*dlast, ddown_bias), (dup_bias,), (*dfirst, dout_bias), *of_qkv = norm.sums_of(
        *kinds, dtype=dtype
    )
    dbiases = of_each(*of_qkv[0]) if of_qkv else (None,) * products
    found = [
        *itertools.chain.from_iterable(zip(dweights, dbiases, strict=True)), dout_weight,
        dout_bias, *dfirst, dup_weight, dup_bias, ddown_weight, ddown_bias, *dlast,
    ]  # fmt: skip
    for i, (gradient, dtype, need) in enumerate(zip(found, dtypes, needed, strict=True)):
        if not need:
            found[i] = None
        elif gradient.dtype != dtype:
            found[i] = gradient.to(dtype)
    return dx.to(x_dtype) if needs_x else None, None, *found
