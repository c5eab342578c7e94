"""The ``cuda`` backend: csrc/cuda through pybind11, on the caller's stream.

With BERT_FAST_CUDA_HOST, a path, it is the module there instead: the same kernels compiled for the
CPU (csrc/host), on CPU tensors, for tests.
"""

import functools
import importlib.util
import os

import torch

from bert_fast import _C
from bert_fast.backends.cpu import (
    APPROXIMATE,
    DTYPES,
    address,
    as_float32,
    attention_shape,
    strided,
)
from bert_fast.devices import memory_of_sums, on_own_device


def _module():
    path = os.environ.get("BERT_FAST_CUDA_HOST")
    if not path:
        return _C
    spec = importlib.util.spec_from_file_location("_cuda_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_kernels = _module()


@functools.cache
def _most_programs(device):
    """CTAs that share a sum over rows: two a multiprocessor. It alone sets the order of the sum."""
    if device.type != "cuda":
        return 3
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _programs(x, at_a_time):
    """Those for the rows of a (..., width) tensor: any without rows would add zeros."""
    groups = -(-x.numel() // (at_a_time * x.shape[-1]))
    return max(1, min(groups, _most_programs(x.device)))


def _call(like, seed=None, scratch=None, longest=0, programs=0, table=None, dtable=None):
    """The kernels' Call: device, stream, seed, scratch, longest, programs, table, dtable."""
    device = like.device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return (
        device.index or 0, stream, address(seed), address(scratch), longest, programs,
        (address(table), *((0, 0) if table is None else table.shape[1:])), address(dtable),
    )  # fmt: skip


WEIGHT, BIAS, LINEAR_BIAS = 1, 2, 4  # csrc/cuda/kernels.h


def _parameters(like, *parameters):
    """Parameters as the kernels take them, in ``like``'s dtype or else in float32, and which are in
    ``like``'s: the sum of their numbers. Each is given as (number, tensor or None)."""
    low, taken = 0, []
    for number, parameter in parameters:
        if parameter is not None and parameter.dtype == like.dtype != torch.float32:
            parameter, low = parameter.contiguous(), low + number
        taken.append(parameter if low & number else as_float32(parameter))
    return (*taken, low)


def _scratch(like, *shape):
    return torch.empty(shape, dtype=torch.float32, device=like.device)


@on_own_device("cuda")
def attention_forward(
    q, k, v, cu_q, cu_k, max_q, max_k, bias, scale, causal, dropout_p, seed, out=None,
    position_bias=None,
):  # fmt: skip
    cu_q, cu_k, bias = cu_q.contiguous(), cu_k.contiguous(), as_float32(bias)
    table = as_float32(position_bias)
    out = q.new_empty(q.shape) if out is None else out
    lse = _scratch(q, q.shape[1], q.shape[0])
    _kernels.cuda_attention_forward(
        attention_shape(q, k, cu_q, cu_k, scale, causal, dropout_p, module=_kernels),
        *map(strided, (q, k, v, out)), address(bias), address(lse),
        _call(q, seed, longest=max_k, table=table),
    )  # fmt: skip
    return out, lse


@on_own_device("cuda")
def attention_backward(
    dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, bias, scale, causal, dropout_p, seed,
    dq, dk, dv, position_bias=None, dposition_bias=None,
):  # fmt: skip
    cu_q, cu_k, bias = cu_q.contiguous(), cu_k.contiguous(), as_float32(bias)
    table, longest = as_float32(position_bias), max(max_q, max_k)
    shape = attention_shape(q, k, cu_q, cu_k, scale, causal, dropout_p, module=_kernels)
    size = _kernels.cuda_attention_scratch(shape, _call(q, longest=longest, table=table))
    scratch = _scratch(q, size)
    _kernels.cuda_attention_backward(
        shape, *map(strided, (q, k, v, out, dout, dq, dk, dv)), address(bias), address(lse),
        _call(q, seed, scratch, longest, table=table, dtable=dposition_bias),
    )  # fmt: skip


@on_own_device("cuda")
def layer_norm_forward(
    x, weight, bias, residual, linear_bias, eps, dropout_p, seed, out=None, training=True
):
    """Returns out, and for backward the normalised sum (None where it is x itself), mean, rstd."""
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    out = torch.empty_like(x) if out is None else out
    is_x = residual is None and linear_bias is None and dropout_p == 0
    total = torch.empty_like(x) if training and not is_x else None
    mean, rstd = (_scratch(x, rows) if training else None for _ in range(2))
    weight, bias, linear_bias, low = _parameters(
        x, (WEIGHT, weight), (BIAS, bias), (LINEAR_BIAS, linear_bias)
    )
    _kernels.cuda_layer_norm_forward(
        DTYPES[x.dtype], rows, hidden, *map(address, (x, residual, linear_bias, weight, bias)),
        *map(address, (out, total, mean, rstd)), eps, dropout_p, 0, 0, _call(x, seed),
        low=low,
    )  # fmt: skip
    return out, total, mean, rstd


@on_own_device("cuda")
def layer_norm_backward(
    dout, total, mean, rstd, weight, has_linear_bias, dropout_p, seed, partial=False
):
    """Returns dx (None without dropout: it is dresidual), dresidual, dweight, dbias, and
    dlinear_bias (None without a linear bias); with ``partial``, in place of these sums one tensor,
    (sums, programs, width), of the programs' own."""
    hidden = total.shape[-1]
    dresidual = torch.empty_like(total)
    dx = torch.empty_like(total) if dropout_p > 0 else None
    weight, low = _parameters(total, (WEIGHT, weight))
    programs = _programs(total, 8 if hidden <= 1024 else 1)  # a row a warp, or all warps
    partials = _scratch(total, 3, programs, hidden)
    _kernels.cuda_layer_norm_backward(
        DTYPES[total.dtype], total.numel() // hidden, hidden,
        *map(address, (dout, total, mean, rstd, weight, dresidual, dx)), 0, 0, 0, dropout_p, 0, 0,
        _call(total, seed, partials, programs=programs), low=low,
    )  # fmt: skip
    partials = partials if has_linear_bias else partials[:2]
    if partial:
        return dx, dresidual, partials
    dweight, dbias, *rest = sums_of(partials)[0]
    return dx, dresidual, dweight, dbias, rest[0] if rest else None


@on_own_device("cuda")
def gelu_forward(x, bias, approximate, out=None):
    out = torch.empty_like(x) if out is None else out
    bias, low = _parameters(x, (BIAS, bias))
    _kernels.cuda_gelu_forward(
        DTYPES[x.dtype], x.numel() // x.shape[-1], x.shape[-1], *map(address, (x, bias, out)),
        APPROXIMATE[approximate], 0, _call(x), low=low,
    )  # fmt: skip
    return out


@on_own_device("cuda")
def gelu_backward(dout, x, bias, approximate, partial=False):
    """Returns dx and dbias (None without a bias); with ``partial``, in place of dbias the programs'
    own sums, (1, programs, width)."""
    dx, width = torch.empty_like(x), x.shape[-1]
    bias, low = _parameters(x, (BIAS, bias))
    programs = _programs(x, 4)
    partials = None if bias is None else _scratch(x, 1, programs, width)
    _kernels.cuda_gelu_backward(
        DTYPES[x.dtype], x.numel() // width, width, *map(address, (dout, x, bias, dx)), 0,
        APPROXIMATE[approximate], 0, _call(x, scratch=partials, programs=programs), low=low,
    )  # fmt: skip
    return dx, partials if partial or bias is None else sums_of(partials)[0][0]


@on_own_device("cuda")
def sums_of(*kinds, dtype=torch.float32):
    """The sums of up to four (sums, count, width) float32 tensors over ``count``, by one kernel in
    a fixed order: a list of (width,) tensors of ``dtype`` for each, which share their memory."""
    out, found = memory_of_sums(kinds, _kernels.SUM_COLUMNS, dtype)
    _kernels.cuda_sum_partials(
        DTYPES[dtype], [(address(k), *k.shape) for k in kinds], address(out), _call(out)
    )
    return found


def column_partials(x):
    """(1, 1, width) float32: PyTorch's sums over the rows of a (rows, width) tensor."""
    return x.sum(0, dtype=torch.float32)[None, None]
