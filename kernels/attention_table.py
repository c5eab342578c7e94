"""The gradient of attention's position bias: dB, the sum of dS (attention.py) over the sequences.

A program owns a tile of one head's table and goes through every chunks-th sequence, so that nothing
is added atomically; what the chunks found is added in order.
"""

import triton.language as tl

from bert_fast.kernels.attention_tiles import (
    COUNTS,
    key_order,
    load_queries,
    load_rows,
    rows_from,
    score_factor,
    score_gradients,
    span,
    statistics,
    table_from,
)
from bert_fast.kernels.common import cdiv, processors, summed
from bert_fast.kernels.launch import kernel


@kernel(do_not_specialize=[*COUNTS, "cols"])
def _backward(
    dout, q, k, v, bias, table, work,
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
    head, row = tl.program_id(1), first + tl.arange(0, BLOCK_M)
    col = begin + key_order(BLOCK_N, DROPOUT)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    table_at = table_from(table, first, begin, table_rows, table_cols)
    for sequence in range(tl.program_id(2), batch, tl.num_programs(2)):
        q_begin, q_length = span(cu_q, sequence, batch)
        k_begin, k_length = span(cu_k, sequence, batch)
        meets = (first < q_length) & (begin < k_length)
        if CAUSAL:
            meets &= begin < first + BLOCK_M + k_length - q_length
        if meets:
            q_first, k_first = q_begin + first, k_begin + begin
            queries = load_queries(rows_from(q, q_first, q_stride, q_head), q_length - first,
                                   q_stride, bias, heads, HAS_BIAS, HEAD_DIM, BLOCK_D, BLOCK_M,
                                   True)  # fmt: skip
            keys = load_rows(rows_from(k, k_first, k_stride, k_head), k_length - begin, k_stride,
                             HEAD_DIM, BLOCK_D, BLOCK_N, True, DROPOUT)  # fmt: skip
            douts = load_rows(rows_from(dout, q_first, dout_stride, dout_head), q_length - first,
                              dout_stride, HEAD_DIM, BLOCK_D, BLOCK_M, True)  # fmt: skip
            values = load_rows(rows_from(v, k_first, v_stride, v_head), k_length - begin, v_stride,
                               HEAD_DIM, BLOCK_D, BLOCK_N, True, DROPOUT)  # fmt: skip
            work_at = work + tl.program_id(1).to(tl.int64) * total_q + q_first
            log, center, extra = statistics(work_at, q_length - first, total_q, heads,
                                            DROPOUT and HAS_BIAS, True, BLOCK_M)  # fmt: skip
            _, dscores = score_gradients(
                queries, keys, values, douts, log, center, extra, table_at, seed, first, begin,
                q_length, k_length, table_cols, score_factor(scale), cut, keep_scale, sequence,
                True, CAUSAL, DROPOUT, HAS_BIAS, True, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
            total += dscores
    chunk = tl.program_id(2).to(tl.int64)
    at = dtable + ((chunk * heads + head) * table_rows + first) * cols
    at += (row - first)[:, None] * cols + col[None, :]
    tl.store(at, total, (row < table_rows)[:, None] & (col < cols)[None, :])


def backward(inputs, dtable, cu_q, cu_k, seed, strides, batch, numbers, constants, **settings):
    """Writes ``dtable``, (heads, rows, columns) float32, of what attention_backward gives its other
    kernels."""
    heads, rows, cols = dtable.shape
    tiles = cdiv(rows, constants["BLOCK_M"]) * cdiv(cols, constants["BLOCK_N"])
    # Enough programs to fill the chip twice, where there are sequences for them.
    chunks = max(1, min(batch, cdiv(2 * processors(dtable.device), tiles * heads)))
    found = dtable.view(1, -1)
    if chunks > 1:
        found = dtable.new_empty(chunks, dtable.numel())
    _backward[(tiles, heads, chunks)](
        *inputs, found, cu_q, cu_k, seed, *strides, batch, inputs[0].shape[0], cols,
        *numbers, **constants, **settings,
    )  # fmt: skip
    if chunks > 1:
        summed(found, dtable.view(-1))
