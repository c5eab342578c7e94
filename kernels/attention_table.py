"""The gradient of attention's position bias: dB, the sum of dS (attention.py) over the sequences.

A program owns a tile of one head's table and goes through every chunks-th sequence, so that nothing
is added atomically; what the chunks found is added in order.
"""

import triton
import triton.language as tl

from bert_fast.kernels.attention_tiles import (
    COUNTS,
    LOG2E,
    load_rows,
    plus_table,
    seen_pairs,
    span,
    statistics,
)
from bert_fast.kernels.common import dot, keep_mask, processors, summed
from bert_fast.kernels.launch import kernel


@kernel(do_not_specialize=[*COUNTS, "cols"])
def _backward(
    dout, q, k, v, bias, table, lse, delta,
    dtable,  # (chunks, heads, table_rows, cols) float32
    cu_q, cu_k, seed,
    dout_stride, dout_head, q_stride, q_head, k_stride, k_head, v_stride, v_head,
    batch, total_q, cols, heads, table_rows, table_cols, scale, cut, keep_scale,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,  # always: attention's other kernels ask
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of a table, heads, chunks)."""
    across = tl.cdiv(cols, BLOCK_N)
    first = tl.program_id(0) // across * BLOCK_M
    begin = tl.program_id(0) % across * BLOCK_N
    head, row, col = tl.program_id(1), first + tl.arange(0, BLOCK_M), begin + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for sequence in range(tl.program_id(2), batch, tl.num_programs(2)):
        q_begin, q_length = span(cu_q, sequence, batch)
        k_begin, k_length = span(cu_k, sequence, batch)
        meets = (first < q_length) & (begin < k_length)
        if CAUSAL:
            meets &= begin < first + BLOCK_M + k_length - q_length
        if meets:
            if DROPOUT:  # first, while registers are free
                keep = keep_mask(tl.load(seed), cut, row, begin // 4, head, sequence, BLOCK_M,
                                 BLOCK_N // 4)  # fmt: skip
            queries = load_rows(q, q_begin, row, q_length, q_stride, q_head, bias, 0, heads,
                                HAS_BIAS, HEAD_DIM, BLOCK_D)  # fmt: skip
            keys = load_rows(k, k_begin, col, k_length, k_stride, k_head, bias, 1, heads, HAS_BIAS,
                             HEAD_DIM, BLOCK_D)  # fmt: skip
            scores = dot(queries, tl.trans(keys), None, PRECISION) * (scale * LOG2E)
            seen = seen_pairs(row, col, q_length, k_length, CAUSAL)
            scores = plus_table(scores, table, first, row, col, q_length, table_rows, table_cols)
            log, center = statistics(lse, delta, q_begin, row, q_length, total_q)
            weights = tl.where(seen, tl.exp2(scores - log[:, None]), 0.0)
            douts = load_rows(dout, q_begin, row, q_length, dout_stride, dout_head, bias, 0, heads,
                              False, HEAD_DIM, BLOCK_D)  # fmt: skip
            values = load_rows(v, k_begin, col, k_length, v_stride, v_head, bias, 2, heads,
                               HAS_BIAS, HEAD_DIM, BLOCK_D)  # fmt: skip
            dweights = dot(douts, tl.trans(values), None, PRECISION)
            if DROPOUT:
                dweights = tl.where(keep, dweights * keep_scale, 0.0)
            total += weights * (dweights - center[:, None])
    chunk = tl.program_id(2).to(tl.int64)
    at = dtable + ((chunk * heads + head) * table_rows + first) * cols
    at += (row - first)[:, None] * cols + col[None, :]
    tl.store(at, total, (row < table_rows)[:, None] & (col < cols)[None, :])


def backward(inputs, dtable, cu_q, cu_k, seed, strides, batch, numbers, constants, **settings):
    """Writes ``dtable``, (heads, rows, columns) float32, of what attention_backward gives its other
    kernels."""
    heads, rows, cols = dtable.shape
    tiles = triton.cdiv(rows, constants["BLOCK_M"]) * triton.cdiv(cols, constants["BLOCK_N"])
    # Enough programs to fill the chip twice, where there are sequences for them.
    chunks = max(1, min(batch, triton.cdiv(2 * processors(dtable.device), tiles * heads)))
    found = dtable.view(1, -1)
    if chunks > 1:
        found = dtable.new_empty(chunks, dtable.numel())
    _backward[(tiles, heads, chunks)](
        *inputs, found, cu_q, cu_k, seed, *strides, batch, inputs[0].shape[0], cols,
        *numbers, **constants, **settings,
    )  # fmt: skip
    if chunks > 1:
        summed(found, dtable.view(-1))
