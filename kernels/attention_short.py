"""The gradients of attention (attention.py) where a sequence's queries are one tile.

A program owns a sequence and head: it makes dq, dk and dv by five products, where two kernels need
seven, and draws what dropout keeps once.
"""

import triton
import triton.language as tl

from bert_fast.kernels.attention_tiles import (
    COUNTS,
    find_statistics,
    load_queries,
    load_rows,
    rows_from,
    rows_on,
    score_factor,
    score_gradients,
    store_rows,
)
from bert_fast.kernels.common import dot
from bert_fast.kernels.launch import kernel


@triton.jit
def _clear(base, begin, total, stride, head_stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeros from row ``begin`` to the last."""
    zeros = tl.zeros((32, BLOCK_D), tl.float32)
    for first in range(0, total - begin, 32):
        store_rows(rows_from(base, begin + first, stride, head_stride), zeros,
                   total - begin - first, stride, HEAD_DIM, BLOCK_D, 32)  # fmt: skip


@kernel(do_not_specialize=COUNTS)
def _backward(
    dout, q, k, v, bias, out, lse, dq, dk, dv, cu_q, cu_k, seed,
    dout_stride, dout_head, q_stride, q_head, k_stride, k_head, v_stride, v_head, out_stride,
    out_head, dq_stride, dq_head, dk_stride, dk_head, dv_stride, dv_head, batch, total_q, total_k,
    heads, scale, cut, keep_scale,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (batch + 1, heads); the last sequence is the rows past the others: zeros."""
    sequence = tl.program_id(0)
    q_begin, k_begin = tl.load(cu_q + sequence), tl.load(cu_k + sequence)
    if sequence == batch:
        _clear(dq, q_begin, total_q, dq_stride, dq_head, HEAD_DIM, BLOCK_D)
        _clear(dk, k_begin, total_k, dk_stride, dk_head, HEAD_DIM, BLOCK_D)
        _clear(dv, k_begin, total_k, dv_stride, dv_head, HEAD_DIM, BLOCK_D)
        return
    q_length = tl.load(cu_q + sequence + 1) - q_begin
    k_length = tl.load(cu_k + sequence + 1) - k_begin
    tl.device_assert(q_length <= BLOCK_M, "max_seqlen is below the longest sequence")
    queries = load_queries(rows_from(q, q_begin, q_stride, q_head), q_length, q_stride, bias, heads,
                           HAS_BIAS, HEAD_DIM, BLOCK_D, BLOCK_M, True)  # fmt: skip
    douts = load_rows(rows_from(dout, q_begin, dout_stride, dout_head), q_length, dout_stride,
                      HEAD_DIM, BLOCK_D, BLOCK_M, True)  # fmt: skip
    factor = score_factor(scale)
    log, center, extra = find_statistics(
        queries, douts, out, lse, lse, bias, q_begin, 0, q_length, out_stride, out_head, total_q,
        heads, factor, DROPOUT, HAS_BIAS, HEAD_DIM, BLOCK_D, BLOCK_M, False,
    )  # fmt: skip
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    keys_at = rows_from(k, k_begin, k_stride, k_head)
    values_at = rows_from(v, k_begin, v_stride, v_head)
    for begin in range(0, k_length, BLOCK_N):
        left = k_length - begin
        keys = load_rows(keys_at, left, k_stride, HEAD_DIM, BLOCK_D, BLOCK_N, True, DROPOUT)
        values = load_rows(values_at, left, v_stride, HEAD_DIM, BLOCK_D, BLOCK_N, True, DROPOUT)
        dropped, dscores = score_gradients(
            queries, keys, values, douts, log, center, extra, lse, seed, 0, begin, q_length,
            k_length, 0, factor, cut, keep_scale, sequence, True, CAUSAL, DROPOUT, HAS_BIAS,
            False, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        # Always so. In a region of its own a product has its warps by its own rows and columns;
        # beside the products above it had theirs, for their rows, which are more.
        if begin < k_length:
            dvalues = dot(tl.trans(dropped.to(douts.dtype)), douts, None, PRECISION)
            store_rows(rows_from(dv, k_begin + begin, dv_stride, dv_head), dvalues, left, dv_stride,
                       HEAD_DIM, BLOCK_D, BLOCK_N, DROPOUT)  # fmt: skip
        dscores = dscores.to(keys.dtype)
        if begin < k_length:
            dkeys = dot(tl.trans(dscores), queries, None, PRECISION)
            store_rows(rows_from(dk, k_begin + begin, dk_stride, dk_head), dkeys * scale, left,
                       dk_stride, HEAD_DIM, BLOCK_D, BLOCK_N, DROPOUT)  # fmt: skip
        total = dot(dscores, keys, total, PRECISION)
        keys_at += rows_on(k_stride, BLOCK_N)
        values_at += rows_on(v_stride, BLOCK_N)
    store_rows(rows_from(dq, q_begin, dq_stride, dq_head), total * scale, q_length, dq_stride,
               HEAD_DIM, BLOCK_D, BLOCK_M)  # fmt: skip


def backward(tensors, cu_q, cu_k, seed, strides, batch, numbers, constants, **settings):
    """Writes the gradients; of what attention_backward gives its other kernels."""
    q, k = tensors[1:3]
    _backward[(batch + 1, q.shape[1])](
        *tensors, cu_q, cu_k, seed, *strides, batch, q.shape[0], k.shape[0], *numbers, debug=True,
        sanitize_overflow=False, **constants, **settings,
    )  # fmt: skip
