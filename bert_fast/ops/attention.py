"""The ops: what users call, what ``torch.library`` knows, what backends implement.

A call is validated, then runs on the backend that :mod:`bert_fast.backends` chooses: the eager
reference as plain differentiable PyTorch, a kernel through a ``torch.library`` op
(``torch.ops.bert_fast.*``) with fake, autograd and autocast implementations, so that
``torch.compile``, ``torch.export`` and activation checkpointing see through it.

Under autocast, ``attention`` and ``layer_norm`` take the autocast dtype and ``gelu`` its input's:
the kernels keep statistics and sums in fp32 whatever the storage is.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast import backends
from bert_fast.ops import reference

# ------------------------------------------------------------------------------------------------
# Validation
# ------------------------------------------------------------------------------------------------


def _check(ok, message, error=ValueError):
    """A message that names a number of tokens is a function: tracing then does not ask for it, and
    compiles once for all."""
    if not ok:
        raise error(message() if callable(message) else message)


def _shape(tensor):
    return None if tensor is None else tuple(tensor.shape)


def _check_tensors(first, **others):
    """Tensors where tensors belong, floating, on one device. ``first`` is (name, tensor)."""
    name, tensor = first
    for n, t in {name: tensor, **others}.items():
        if t is None:
            continue
        _check(isinstance(t, Tensor), f"{n} must be a tensor, not {type(t).__name__}", TypeError)
        _check(t.is_floating_point(), f"{n} must be floating point, not {t.dtype}", TypeError)
        _check(t.device == tensor.device, f"{n} is on {t.device}, {name} on {tensor.device}")


def _check_same_dtype(first, **others):
    name, tensor = first
    for n, t in others.items():
        _check(
            t is None or t.dtype == tensor.dtype,
            f"{n} is {getattr(t, 'dtype', None)}, {name} is {tensor.dtype}: they must agree",
            TypeError,
        )


def _check_vector(name, tensor, width):
    _check(
        tensor is None or _shape(tensor) == (width,),
        lambda: f"{name} must have shape ({width},), not {_shape(tensor)}",
    )


def is_concrete(tensor):
    """Whether the values can be looked at without tracing trouble and without a wait."""
    return (
        not torch.compiler.is_compiling() and type(tensor) is Tensor and tensor.device.type == "cpu"
    )


def check_cu_seqlens(name, cu_seqlens, tokens, device, max_seqlen, padded_tail):
    """Validates what can be seen without waiting for a device; returns max_seqlen."""
    _check(isinstance(cu_seqlens, Tensor), f"{name} must be a tensor", TypeError)
    _check(
        cu_seqlens.dtype == torch.int32, f"{name} must be int32, not {cu_seqlens.dtype}", TypeError
    )
    _check(
        cu_seqlens.ndim == 1 and cu_seqlens.numel() >= 1,
        lambda: f"{name} must have shape (batch + 1,), not {_shape(cu_seqlens)}",
    )
    _check(
        cu_seqlens.device == device,
        lambda: f"{name} is on {cu_seqlens.device}, the tokens on {device}",
    )
    if not is_concrete(cu_seqlens):
        return tokens if max_seqlen is None else max_seqlen
    offsets = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in itertools.pairwise(offsets)]
    _check(offsets[0] == 0, f"{name} must start at 0, not {offsets[0]}")
    _check(min(lengths, default=0) >= 0, f"{name} must not decrease: {offsets}")
    if padded_tail:
        _check(
            offsets[-1] <= tokens, lambda: f"{name} ends at {offsets[-1]}, past the {tokens} rows"
        )
    else:
        _check(
            offsets[-1] == tokens,
            lambda: f"{name} ends at {offsets[-1]}, but there are {tokens} tokens",
        )
    longest = max(lengths, default=0)
    _check(
        max_seqlen is None or max_seqlen >= longest,
        lambda: f"max_seqlen is {max_seqlen}, but {name} holds a sequence of {longest}",
    )
    return longest if max_seqlen is None else max_seqlen


def _check_dropout(dropout_p, seed, device):
    """Returns the seed as an int64 tensor of one element on ``device``, or None without dropout."""
    _check(0.0 <= dropout_p < 1.0, f"dropout_p must be in [0, 1), not {dropout_p}")
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(2**62, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        _check(
            seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == device,
            lambda: (
                f"seed must be one int64 on {device}, "
                f"not {_shape(seed)} {seed.dtype} on {seed.device}"
            ),
        )
        return seed.reshape(1)
    _check(
        isinstance(seed, int) and 0 <= seed < 2**63,
        f"seed must be an integer in [0, 2**63), not {seed!r}",
    )
    return torch.tensor([seed], dtype=torch.int64, device=device)


def _check_approximate(approximate):
    _check(
        approximate in ("none", "tanh"),
        f"approximate must be 'none' or 'tanh', not {approximate!r}",
    )


def _check_out(out, like, needs_grad, device=None):
    device = device or like.device
    _check(
        not needs_grad,
        "out= writes in place, which autograd cannot follow: call without out, or under "
        "torch.no_grad()",
        RuntimeError,
    )
    _check(
        out.shape == like.shape and out.dtype == like.dtype and out.device == device,
        lambda: (
            f"out must be {_shape(like)} {like.dtype} on {device}, "
            f"not {_shape(out)} {out.dtype} on {out.device}"
        ),
    )
    _check(out.is_contiguous(), "out must be contiguous")


def _needs_grad(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocast(*tensors):
    """What torch.autocast does to a list of op arguments: fp32 and 16-bit floats take its dtype."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _rows_contiguous(tensor):
    """Kernels take any strides but the last dimension's."""
    return tensor if tensor.stride(-1) == 1 or tensor.numel() == 0 else tensor.contiguous()


# ------------------------------------------------------------------------------------------------
# torch.library
# ------------------------------------------------------------------------------------------------

_library = torch.library.Library("bert_fast", "DEF")


def _define(schema):
    """Registers a function as the kernel-running implementation of ``bert_fast::<schema>``."""
    name = schema[: schema.index("(")]

    def register(function):
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


def _register_autocast(name, num_activations):
    """Autocast for direct calls of ``torch.ops.bert_fast.<name>``: its first arguments are cast."""
    op = getattr(torch.ops.bert_fast, name)
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast(*args, _device=device, _keys=keys):
            activations = _autocast(*args[:num_activations]) if num_activations else ()
            with torch._C._ExcludeDispatchKeyGuard(_keys):
                return op(*activations, *args[num_activations:])

        _library.impl(name, cast, key)


_ATTENTION_OPTIONS = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "Tensor? bias, float softmax_scale, bool causal, float dropout_p, Tensor? seed, str backend"
)


@_define(f"attention(Tensor q, Tensor k, Tensor v, {_ATTENTION_OPTIONS}) -> (Tensor, Tensor)")
def _attention(q, k, v, *options):
    q, k, v = map(_rows_contiguous, (q, k, v))
    return backends.module(options[-1]).attention_forward(q, k, v, *options[:-1])


@_define(f"attention_qkv(Tensor qkv, {_ATTENTION_OPTIONS}) -> (Tensor, Tensor)")
def _attention_qkv(qkv, *options):
    return _attention(*_rows_contiguous(qkv).unbind(1), *options)


@_define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_ATTENTION_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
def _attention_backward(dout, q, k, v, out, lse, *options):
    dout, q, k, v = map(_rows_contiguous, (dout, q, k, v))
    gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    backend = backends.module(options[-1])
    backend.attention_backward(dout, q, k, v, out, lse, *options[:-1], *gradients)
    return gradients


@_define(
    "attention_qkv_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, "
    f"{_ATTENTION_OPTIONS}) -> Tensor"
)
def _attention_qkv_backward(dout, qkv, out, lse, *options):
    dout, qkv = _rows_contiguous(dout), _rows_contiguous(qkv)
    dqkv = qkv.new_empty(qkv.shape)
    backend = backends.module(options[-1])
    backend.attention_backward(dout, *qkv.unbind(1), out, lse, *options[:-1], *dqkv.unbind(1))
    return dqkv


@_define(
    "layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor? linear_bias, "
    "float eps, float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _layer_norm(x, residual, weight, bias, linear_bias, eps, dropout_p, seed, backend):
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    out, total, mean, rstd = backends.module(backend).layer_norm_forward(
        x, weight, bias, residual, linear_bias, eps, dropout_p, seed
    )
    # No output of an op may be one of its inputs: where x itself was normalised, nothing is kept.
    return out, x.new_empty(0) if total is None else total, mean, rstd


@_define(
    "layer_norm_backward(Tensor dout, Tensor total, Tensor mean, Tensor rstd, Tensor weight, "
    "bool has_linear_bias, float dropout_p, Tensor? seed, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _layer_norm_backward(dout, total, mean, rstd, weight, *options):
    *options, backend = options
    dx, dresidual, dweight, dbias, dlinear_bias = backends.module(backend).layer_norm_backward(
        dout.contiguous(), total.contiguous(), mean, rstd, weight, *options
    )
    # A schema has no optional results: what is absent is empty.
    dx = total.new_empty(0) if dx is None else dx
    if dlinear_bias is None:
        dlinear_bias = total.new_empty(0, dtype=torch.float32)
    return dx, dresidual, dweight, dbias, dlinear_bias


@_define("gelu(Tensor x, Tensor? bias, str approximate, str backend) -> Tensor")
def _gelu(x, bias, approximate, backend):
    return backends.module(backend).gelu_forward(x.contiguous(), bias, approximate)


@_define(
    "gelu_backward(Tensor dout, Tensor x, Tensor? bias, str approximate, str backend) "
    "-> (Tensor, Tensor)"
)
def _gelu_backward(dout, x, bias, approximate, backend):
    dx, dbias = backends.module(backend).gelu_backward(
        dout.contiguous(), x.contiguous(), bias, approximate
    )
    return dx, x.new_empty(0, dtype=torch.float32) if dbias is None else dbias


@_define(
    "linear_gelu(Tensor x, Tensor weight, Tensor? bias, str approximate, bool training, "
    "str backend) -> (Tensor, Tensor)"
)
def _linear_gelu(x, weight, bias, approximate, training, backend):
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out, product = backends.module(backend).linear_gelu_forward(
        rows, weight.contiguous(), bias, approximate, training
    )
    out = out.view(*x.shape[:-1], weight.shape[0])
    return out, x.new_empty(0) if product is None else product.view_as(out)


@_define(
    "linear_gelu_backward(Tensor dout, Tensor product, Tensor? bias, Tensor weight, "
    "str approximate, str backend) -> (Tensor, Tensor, Tensor)"
)
def _linear_gelu_backward(dout, product, bias, weight, approximate, backend):
    width = dout.shape[-1]
    dx, dproduct, dbias = backends.module(backend).linear_gelu_backward(
        dout.reshape(-1, width).contiguous(), product.view(-1, width), bias, weight.contiguous(),
        approximate,
    )  # fmt: skip
    dx = dx.view(*dout.shape[:-1], weight.shape[1])
    dbias = dout.new_empty(0, dtype=torch.float32) if dbias is None else dbias
    return dx, dproduct.view(dout.shape), dbias


@_define(
    "embedding_layer_norm(Tensor input_ids, Tensor position_ids, Tensor? token_type_ids, "
    "Tensor word, Tensor position, Tensor token_type, Tensor weight, Tensor bias, float eps, "
    "int padding_idx, ScalarType dtype, bool training, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
def _embedding_layer_norm(input_ids, position_ids, token_type_ids, *rest):
    *tables, weight, bias, eps, _, dtype, training, backend = rest
    ids = (None if i is None else i.contiguous() for i in (input_ids, position_ids, token_type_ids))
    out, *saved = backends.module(backend).embedding_forward(
        *ids, *(t.contiguous() for t in tables), weight, bias, eps, dtype, training
    )
    return out, *(out.new_empty(0) if t is None else t for t in saved)


# ---- fake: shapes and dtypes alone ----


def _fake(name):
    return torch.library.register_fake(f"bert_fast::{name}", lib=_library)


def _contiguous_like(tensor):
    return tensor.new_empty(tensor.shape)


@_fake("attention")
def _(q, k, v, *options):
    return _contiguous_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@_fake("attention_qkv")
def _(qkv, *options):
    total, _, num_heads, head_dim = qkv.shape
    out = qkv.new_empty((total, num_heads, head_dim))
    return out, qkv.new_empty((num_heads, total), dtype=torch.float32)


@_fake("attention_backward")
def _(dout, q, k, v, *rest):
    return _contiguous_like(q), _contiguous_like(k), _contiguous_like(v)


@_fake("attention_qkv_backward")
def _(dout, qkv, *rest):
    return _contiguous_like(qkv)


@_fake("layer_norm")
def _(x, residual, weight, bias, linear_bias, eps, dropout_p, seed, backend):
    is_x = residual is None and linear_bias is None and dropout_p == 0
    rows = x.numel() // x.shape[-1]
    statistics = [x.new_empty((rows,), dtype=torch.float32) for _ in range(2)]
    return _contiguous_like(x), x.new_empty((0,) if is_x else x.shape), *statistics


@_fake("layer_norm_backward")
def _(dout, total, mean, rstd, weight, has_linear_bias, dropout_p, seed, backend):
    hidden = total.shape[-1]
    sums = [total.new_empty((hidden,), dtype=torch.float32) for _ in range(2)]
    dlinear_bias = total.new_empty((hidden if has_linear_bias else 0,), dtype=torch.float32)
    dx = total.new_empty((0,) if dropout_p == 0 else total.shape)
    return dx, _contiguous_like(total), *sums, dlinear_bias


@_fake("gelu")
def _(x, bias, approximate, backend):
    return _contiguous_like(x)


@_fake("gelu_backward")
def _(dout, x, bias, approximate, backend):
    width = 0 if bias is None else x.shape[-1]
    return _contiguous_like(x), x.new_empty((width,), dtype=torch.float32)


@_fake("linear_gelu")
def _(x, weight, bias, approximate, training, backend):
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return out, x.new_empty(out.shape if training else (0,))


@_fake("linear_gelu_backward")
def _(dout, product, bias, weight, approximate, backend):
    dx = dout.new_empty((*dout.shape[:-1], weight.shape[1]))
    return (
        dx,
        _contiguous_like(dout),
        dout.new_empty((0 if bias is None else dout.shape[-1],), dtype=torch.float32),
    )


@_fake("embedding_layer_norm")
def _(input_ids, position_ids, token_type_ids, word, *rest):
    *_, dtype, training, _ = rest
    rows, width = input_ids.numel() if training else 0, word.shape[1]
    out = word.new_empty((input_ids.numel(), width), dtype=dtype)
    total = out.new_empty((rows, width) if training else (0,))
    kind = torch.float32 if training else dtype
    return out, total, *(word.new_empty((rows,), dtype=kind) for _ in range(2))


# ---- autograd ----


def _save_attention(ctx, inputs, output):
    # The options: cu_q, cu_k, max_q, max_k, bias, scale, causal, dropout_p, seed, backend.
    tensors, options = inputs[:-10], list(inputs[-10:])
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse, options[0], options[1], options[4], options[8])
    ctx.options = options


def _saved_attention(ctx):
    *tensors, cu_q, cu_k, bias, seed = ctx.saved_tensors
    options = list(ctx.options)
    options[0], options[1], options[4], options[8] = cu_q, cu_k, bias, seed
    return tensors, options, bias


def _attention_autograd(ctx, dout, dlse):
    tensors, options, bias = _saved_attention(ctx)
    gradients = torch.ops.bert_fast.attention_backward(dout, *tensors, *options)
    dbias = None
    if bias is not None and ctx.needs_input_grad[7]:
        dbias = torch.stack([g.sum(0, dtype=torch.float32) for g in gradients]).to(bias.dtype)
    return *gradients, None, None, None, None, dbias, *[None] * 5


def _attention_qkv_autograd(ctx, dout, dlse):
    tensors, options, bias = _saved_attention(ctx)
    dqkv = torch.ops.bert_fast.attention_qkv_backward(dout, *tensors, *options)
    dbias = None
    if bias is not None and ctx.needs_input_grad[5]:
        dbias = dqkv.sum(0, dtype=torch.float32).to(bias.dtype)
    return dqkv, None, None, None, None, dbias, *[None] * 5


def _save_layer_norm(ctx, inputs, output):
    x, residual, weight, bias, linear_bias, _, ctx.dropout_p, seed, ctx.backend = inputs
    _, total, mean, rstd = output
    ctx.mark_non_differentiable(total, mean, rstd)
    is_x = residual is None and linear_bias is None and ctx.dropout_p == 0
    ctx.save_for_backward(x if is_x else total, mean, rstd, weight, seed)
    ctx.has_residual = residual is not None
    ctx.bias_dtype = bias.dtype
    ctx.linear_bias_dtype = None if linear_bias is None else linear_bias.dtype


def _layer_norm_autograd(ctx, dout, *_):
    total, mean, rstd, weight, seed = ctx.saved_tensors
    has_linear_bias = ctx.linear_bias_dtype is not None
    dx, dresidual, dweight, dbias, dlinear_bias = torch.ops.bert_fast.layer_norm_backward(
        dout, total, mean, rstd, weight, has_linear_bias, ctx.dropout_p, seed, ctx.backend
    )
    return (
        dresidual if ctx.dropout_p == 0 else dx,
        dresidual if ctx.has_residual else None,
        dweight.to(weight.dtype),
        dbias.to(ctx.bias_dtype),
        dlinear_bias.to(ctx.linear_bias_dtype) if has_linear_bias else None,
        *[None] * 4,
    )


def _save_gelu(ctx, inputs, output):
    x, bias, ctx.approximate, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _gelu_autograd(ctx, dout):
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.bert_fast.gelu_backward(dout, x, bias, ctx.approximate, ctx.backend)
    return dx, None if bias is None else dbias.to(bias.dtype), None, None


def _save_linear_gelu(ctx, inputs, output):
    x, weight, bias, ctx.approximate, _, ctx.backend = inputs
    _, product = output
    ctx.mark_non_differentiable(product)
    ctx.save_for_backward(x, weight, bias, product)


def _linear_gelu_autograd(ctx, dout, _):
    x, weight, bias, product = ctx.saved_tensors
    dx, dproduct, dbias = torch.ops.bert_fast.linear_gelu_backward(
        dout, product, bias, weight, ctx.approximate, ctx.backend
    )
    dweight = None
    if ctx.needs_input_grad[1]:
        dweight = dproduct.reshape(-1, dproduct.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return dx, dweight, None if bias is None else dbias.to(bias.dtype), None, None, None


def _save_embedding_layer_norm(ctx, inputs, output):
    *ids, word, position, token_type, weight, bias, _, ctx.padding_idx, _, _, ctx.backend = inputs
    _, total, mean, rstd = output
    ctx.mark_non_differentiable(total, mean, rstd)
    ctx.save_for_backward(*ids, total, mean, rstd, weight)
    ctx.tables = [(t.shape[0], t.dtype) for t in (word, position, token_type)]
    ctx.bias_dtype = bias.dtype


def _embedding_layer_norm_autograd(ctx, dout, *_):
    *ids, total, mean, rstd, weight = ctx.saved_tensors
    _, dsum, dweight, dbias, _ = torch.ops.bert_fast.layer_norm_backward(
        dout, total, mean, rstd, weight, False, 0.0, None, ctx.backend
    )
    if ids[2] is None:
        ids[2] = torch.zeros_like(ids[0])
    dtables = [
        torch.ops.aten.embedding_dense_backward(dsum.to(dtype), i, count, padding, False)
        if needed else None
        for i, (count, dtype), padding, needed in zip(
            ids, ctx.tables, (ctx.padding_idx, -1, -1), ctx.needs_input_grad[3:6], strict=True
        )
    ]  # fmt: skip
    return *[None] * 3, *dtables, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), *[None] * 5


def _no_second_order(ctx, *_):
    raise NotImplementedError(
        "bert_fast's kernels have no second derivative; backend='eager' has every one"
    )


for _name in ("attention", "attention_qkv", "layer_norm", "gelu", "linear_gelu"):
    torch.library.register_autograd(f"bert_fast::{_name}_backward", _no_second_order, lib=_library)

for _name, _backward, _save in (
    ("attention", _attention_autograd, _save_attention),
    ("attention_qkv", _attention_qkv_autograd, _save_attention),
    ("layer_norm", _layer_norm_autograd, _save_layer_norm),
    ("gelu", _gelu_autograd, _save_gelu),
    ("linear_gelu", _linear_gelu_autograd, _save_linear_gelu),
    ("embedding_layer_norm", _embedding_layer_norm_autograd, _save_embedding_layer_norm),
):
    torch.library.register_autograd(
        f"bert_fast::{_name}", _backward, setup_context=_save, lib=_library
    )
_register_autocast("attention", 3)
_register_autocast("attention_qkv", 1)
_register_autocast("layer_norm", 2)
_register_autocast("gelu", 0)
_register_autocast("linear_gelu", 2)
_register_autocast("embedding_layer_norm", 0)


# ------------------------------------------------------------------------------------------------
# Public
# ------------------------------------------------------------------------------------------------


def attention(
    q, k, v, cu_seqlens, cu_seqlens_k=None, *, max_seqlen=None, max_seqlen_k=None, bias=None,
    softmax_scale=None, causal=False, dropout_p=0.0, seed=None, padded_tail=False,
    return_lse=False, backend=None, out=None,
):  # fmt: skip
    """softmax(Q Kᵀ · softmax_scale) V over packed sequences (Vaswani et al. 2017, eq. 1).

    Args:
        q: (total_tokens, num_heads, head_dim), the tokens of all sequences one after another.
        k, v: (total_tokens_k, num_heads, head_dim). Any strides; only a last dimension that is
            not contiguous is copied. float32, bfloat16 or float16 (float64: eager).
        cu_seqlens: int32 (batch + 1,), on the tokens' device: sequence i is the rows
            ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``. Sequences may be empty.
        cu_seqlens_k: the same for k and v (cross-attention). Default: ``cu_seqlens``.
        max_seqlen, max_seqlen_k: at least the longest sequence. Found from ``cu_seqlens`` when it
            is on the CPU; on a device, where looking would mean waiting, default the token count.
        bias: (3, num_heads, head_dim), added to q, k and v: the projection's bias, folded in.
        softmax_scale: default 1/√head_dim.
        causal: query i of a sequence sees keys up to i + len_k - len_q (the last sees all).
        dropout_p: probability that a weight is zeroed (the others are scaled by 1/(1 - p)).
        seed: int or int64 tensor that, with a weight's position, decides its fate; default: drawn
            from torch's generator.
        padded_tail: rows past the last sequence are allowed, and come out as zeros.
        return_lse: also return the log-sum-exp of the scores, fp32 (num_heads, total_tokens),
            without gradient.
        backend: "auto", "eager", "cpu", "triton" or "cuda"; see :mod:`bert_fast.backends`.
        out: written and returned; inference alone.

    Returns:
        (total_tokens, num_heads, head_dim); with ``return_lse`` the pair (out, lse). A row that
        sees no key is zero.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        BackendUnavailableError: the backend asked for cannot run this.
    """
    _check_tensors(("q", q), k=k, v=v, bias=bias)
    q, k, v = _autocast(q, k, v)
    _check_same_dtype(("q", q), k=k, v=v)
    _check(q.ndim == 3, lambda: f"q must be (total_tokens, num_heads, head_dim), not {_shape(q)}")
    _check(
        k.ndim == 3 and k.shape[1:] == q.shape[1:],
        lambda: f"k must be (total_tokens_k, {q.shape[1]}, {q.shape[2]}), not {_shape(k)}",
    )
    _check(v.shape == k.shape, lambda: f"v must have k's shape {_shape(k)}, not {_shape(v)}")
    if cu_seqlens_k is None:
        _check(
            k.shape[0] == q.shape[0] or padded_tail,
            lambda: (
                f"k has {k.shape[0]} tokens and q {q.shape[0]}: "
                "cu_seqlens_k must say how k's divide"
            ),
        )
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen_k or max_seqlen
    return _run_attention(
        (q, k, v), (q, k, v), reference.attention, "attention", cu_seqlens, cu_seqlens_k,
        max_seqlen, max_seqlen_k, bias, softmax_scale, causal, dropout_p, seed, padded_tail,
        return_lse, backend, out,
    )  # fmt: skip


def attention_qkv(
    qkv, cu_seqlens, *, max_seqlen=None, bias=None, softmax_scale=None, causal=False,
    dropout_p=0.0, seed=None, padded_tail=False, return_lse=False, backend=None, out=None,
):  # fmt: skip
    """:func:`attention` of one fused projection, (total_tokens, 3, num_heads, head_dim), read by
    strides and never copied; its gradient is one tensor of the same shape."""
    _check_tensors(("qkv", qkv), bias=bias)
    (qkv,) = _autocast(qkv)
    _check(
        qkv.ndim == 4 and qkv.shape[1] == 3,
        lambda: f"qkv must be (total_tokens, 3, num_heads, head_dim), not {_shape(qkv)}",
    )

    def eager(qkv, *options):
        return reference.attention(*qkv.unbind(1), *options)

    return _run_attention(
        (qkv,), qkv.unbind(1), eager, "attention_qkv", cu_seqlens, cu_seqlens, max_seqlen,
        max_seqlen, bias, softmax_scale, causal, dropout_p, seed, padded_tail, return_lse,
        backend, out,
    )  # fmt: skip


def _run_attention(
    tensors, qkv, eager, op, cu_q, cu_k, max_q, max_k, bias, softmax_scale, causal, dropout_p,
    seed, padded_tail, return_lse, backend, out,
):  # fmt: skip
    q, k, v = qkv
    _, num_heads, head_dim = q.shape
    _check(head_dim >= 1, "q must have a head_dim of at least 1")
    _check(
        bias is None or _shape(bias) == (3, num_heads, head_dim),
        lambda: f"bias must be (3, {num_heads}, {head_dim}), not {_shape(bias)}",
    )
    same = cu_k is cu_q
    max_q = check_cu_seqlens("cu_seqlens", cu_q, q.shape[0], q.device, max_q, padded_tail)
    if same:
        max_k = max_q
    else:
        max_k = check_cu_seqlens("cu_seqlens_k", cu_k, k.shape[0], q.device, max_k, padded_tail)
    _check(
        cu_k.shape == cu_q.shape,
        lambda: f"cu_seqlens_k has {cu_k.numel() - 1} sequences, cu_seqlens {cu_q.numel() - 1}",
    )
    seed = _check_dropout(dropout_p, seed, q.device)
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else float(softmax_scale)
    _check(math.isfinite(scale), f"softmax_scale must be finite, not {softmax_scale}")
    needs_grad = _needs_grad(*tensors, bias)
    name = backends.choose("attention", q.device.type, q.dtype, needs_grad, backend, head_dim)
    if out is not None:
        _check_out(out, q, needs_grad)
    options = (cu_q, cu_k, max_q, max_k, bias, scale, causal, dropout_p, seed)
    if name == "eager":
        if bias is not None:
            bias = bias.to(q.dtype)
        result, lse = eager(*tensors, *options[:4], bias, *options[5:])
        if out is not None:
            result = out.copy_(result)
    elif out is not None:
        q, k, v = map(_rows_contiguous, (q, k, v))
        result, lse = backends.module(name).attention_forward(q, k, v, *options, out=out)
    else:
        result, lse = getattr(torch.ops.bert_fast, op)(*tensors, *options, name)
    return (result, lse) if return_lse else result


def layer_norm(
    x, weight, bias, *, residual=None, linear_bias=None, eps=1e-12, dropout_p=0.0, seed=None,
    backend=None, out=None,
):  # fmt: skip
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
    _check_tensors(("x", x), weight=weight, bias=bias, residual=residual, linear_bias=linear_bias)
    x, residual = _autocast(x, residual)
    _check(x.ndim >= 1 and x.shape[-1] >= 1, lambda: f"x must be (..., hidden), not {_shape(x)}")
    _check_same_dtype(("x", x), residual=residual)
    _check_vector("weight", weight, x.shape[-1])
    _check_vector("bias", bias, x.shape[-1])
    _check_vector("linear_bias", linear_bias, x.shape[-1])
    _check(
        residual is None or residual.shape == x.shape,
        lambda: f"residual must have x's shape {_shape(x)}, not {_shape(residual)}",
    )
    seed = _check_dropout(dropout_p, seed, x.device)
    needs_grad = _needs_grad(x, weight, bias, residual, linear_bias)
    name = backends.choose("layer_norm", x.device.type, x.dtype, needs_grad, backend, x.shape[-1])
    if out is not None:
        _check_out(out, x, needs_grad)
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
    return torch.ops.bert_fast.layer_norm(
        x, residual, weight, bias, linear_bias, eps, dropout_p, seed, name
    )[0]


def pack_weight(weight):
    """A linear layer's weight prepared for repeated inference, or None where nothing is won by it:
    see :class:`bert_fast.backends.cpu.PackedWeight`."""
    if backends.why_unavailable("cpu") is not None:
        return None
    packed = backends.module("cpu").PackedWeight
    return packed(weight) if packed.possible(weight) else None


def can_use_packed(packed, weight, rows):
    """Whether ``rows`` rows go through a packed weight: enough of them, a weight that is still of
    the right kind, and no other backend asked for."""
    if rows < packed.MIN_ROWS or not packed.possible(weight):
        return False
    return backends.choose("gelu", "cpu", weight.dtype, needs_grad=False) == "cpu"


def gelu(x, bias=None, *, approximate="none", backend=None, out=None):
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
    _check_tensors(("x", x), bias=bias)
    _check(x.ndim >= 1 and x.shape[-1] >= 1, lambda: f"x must be (..., width), not {_shape(x)}")
    _check_vector("bias", bias, x.shape[-1])
    _check_approximate(approximate)
    needs_grad = _needs_grad(x, bias)
    name = backends.choose("gelu", x.device.type, x.dtype, needs_grad, backend)
    if out is not None:
        _check_out(out, x, needs_grad)
    if name == "eager":
        result = reference.gelu(x, None if bias is None else bias.to(x.dtype), approximate)
        return result if out is None else out.copy_(result)
    if out is not None:
        return backends.module(name).gelu_forward(x.contiguous(), bias, approximate, out=out)
    return torch.ops.bert_fast.gelu(x, bias, approximate, name)


def linear_gelu(x, weight, bias=None, *, approximate="none", backend=None, out=None):
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
    _check_tensors(("x", x), weight=weight, bias=bias)
    x, weight = _autocast(x, weight)
    _check(x.ndim >= 1 and x.shape[-1] >= 1, lambda: f"x must be (..., width), not {_shape(x)}")
    _check_same_dtype(("x", x), weight=weight)
    _check(
        weight.ndim == 2 and weight.shape[0] >= 1 and weight.shape[1] == x.shape[-1],
        lambda: f"weight must be (out_width, {x.shape[-1]}), not {_shape(weight)}",
    )
    _check_vector("bias", bias, weight.shape[0])
    _check_approximate(approximate)
    needs_grad = _needs_grad(x, weight, bias)
    name = backends.choose("linear_gelu", x.device.type, x.dtype, needs_grad, backend)
    if out is not None:
        like = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device="meta")
        _check_out(out, like, needs_grad, x.device)
    if name != "eager":
        result, _ = torch.ops.bert_fast.linear_gelu(x, weight, bias, approximate, needs_grad, name)
        return result if out is None else out.copy_(result)
    if out is None:
        return gelu(F.linear(x, weight), bias, approximate=approximate, backend=backend)
    product = torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out=out.view(-1, weight.shape[0]))
    return gelu(product, bias, approximate=approximate, backend=backend, out=product).view(
        out.shape
    )


def _check_packed_ids(name, ids, like, device):
    _check(
        isinstance(ids, Tensor) and ids.dtype in (torch.int32, torch.int64),
        f"{name} must be an int64 or int32 tensor", TypeError,
    )  # fmt: skip
    _check(
        ids.ndim == 1 and ids.shape == like.shape,
        lambda: f"{name} must be packed, (total_tokens,), and like input_ids, not {_shape(ids)}",
    )
    _check(ids.device == device, f"{name} is on {ids.device}, word on {device}")


def _check_in_tables(ids, tables):
    """What torch's embedding checks, where the values can be seen; on a device the kernel does."""
    for (name, tensor), table in zip(ids.items(), tables, strict=True):
        if tensor is not None and is_concrete(tensor) and tensor.numel():
            low, high = (int(bound) for bound in torch.aminmax(tensor))
            _check(
                low >= 0 and high < len(table),
                f"{name} out of range: {low} to {high}, the table has 0 to {len(table) - 1}",
                IndexError,
            )


def embedding_layer_norm(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, *,
    eps=1e-12, padding_idx=None, backend=None,
):  # fmt: skip
    """LN(word[input_ids] + position[position_ids] + token_type[token_type_ids]) · weight + bias.

    Args:
        input_ids, position_ids, token_type_ids: packed, (total_tokens,), int32 or int64;
            token_type_ids None means all 0. Ids outside of their tables are torch's own errors.
        word, position, token_type: embedding tables, (number, hidden).
        weight, bias, eps: layer-norm's, as in :func:`layer_norm`.
        padding_idx: the row of ``word`` that gets no gradient.

    Returns:
        (total_tokens, hidden); under autocast in its dtype, else in the tables'.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        BackendUnavailableError: the backend asked for cannot run this.
    """
    _check_tensors(
        ("word", word), position=position, token_type=token_type, weight=weight, bias=bias
    )
    _check_same_dtype(("word", word), position=position, token_type=token_type)
    for name, table in (("word", word), ("position", position), ("token_type", token_type)):
        _check(
            table.ndim == 2 and table.shape[1] == word.shape[1] >= 1,
            f"{name} must be (number, {word.shape[-1]}), not {_shape(table)}",
        )
    ids = {
        "input_ids": input_ids, "position_ids": position_ids, "token_type_ids": token_type_ids
    }  # fmt: skip
    for name, tensor in ids.items():
        if tensor is not None or name != "token_type_ids":
            _check_packed_ids(name, tensor, input_ids, word.device)
    _check_vector("weight", weight, word.shape[1])
    _check_vector("bias", bias, word.shape[1])
    needs_grad = _needs_grad(word, position, token_type, weight, bias)
    device, width = word.device.type, word.shape[1]
    name = backends.choose("embedding_layer_norm", device, word.dtype, needs_grad, backend, width)
    if name != "eager":
        _check_in_tables(ids, (word, position, token_type))
        on = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if on else word.dtype
        return torch.ops.bert_fast.embedding_layer_norm(
            input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps,
            -1 if padding_idx is None else padding_idx, dtype, needs_grad, name,
        )[0]  # fmt: skip
    rest, first = F.embedding(position_ids, position), None
    if token_type_ids is None:
        first = token_type[0]
    else:
        rest = rest + F.embedding(token_type_ids, token_type)
    return layer_norm(
        F.embedding(input_ids, word, padding_idx), weight, bias, residual=rest, linear_bias=first,
        eps=eps, backend=backend,
    )  # fmt: skip
