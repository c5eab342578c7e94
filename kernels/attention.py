"""softmax(Q K^T * scale + B) V of packed sequences (Vaswani et al. 2017, eq. 1), and its gradient.

With S = scale Q K^T + B, B the position bias (or 0), P = softmax(S), Z dropout's mask / (1 - p) and
O = (P * Z) V, for each row:

    dV = (P * Z)^T dO        dP = (dO V^T) * Z        delta = rowsum(P * dP) = rowsum(dO * O)
    dS = P * (dP - delta)    dQ = scale dS K          dK = scale dS^T Q
    dB = the sum over all sequences of dS

(Dao et al. 2022, appendix B.2). Forward keeps O and lse, the log-sum-exp of a row of S; backward
recomputes P = exp(S - lse), draws the mask again, and is deterministic: one kernel owns a tile of
queries and makes dQ, another owns a tile of keys and makes dK and dV; attention_short.py makes all
three where a sequence's queries are one tile, attention_table.py has dB.

**What a loop need not do.** Whole tiles need no mask: loops go over those, then the others. The
scale is part of the exponent: exp2(c s - max(c s)) is one multiplication and addition. Of the
projections' biases k's adds the same to all scores of a row, so it is part of lse alone; v's adds
the same to all that P sums, so it comes after the loop, times the sum of what dropout keeps. In
backward v's adds dO bias_v to all of a row's dP. A program adds q's to its queries.

**No program for padding.** Tiles of BLOCK rows are numbered so that sequence s owns those from
cu[s] // BLOCK + s: a program finds its sequence by a search in cu_seqlens, with no table to build
and nothing to wait for, and there are at most batch + 1 tiles too many, which return at once.
The rows past the last sequence are one more, which sees no keys: zeros.
"""

import functools

import torch
import triton
import triton.language as tl

from bert_fast.devices import on_own_device
from bert_fast.kernels import attention_settings, attention_short, attention_table, tuning
from bert_fast.kernels.attention_settings import candidates, parts_of_sum, registers, settings
from bert_fast.kernels.attention_tiles import (
    COUNTS,
    LN2,
    LOWEST,
    attend,
    find,
    find_statistics,
    keys_seen,
    load_bias,
    load_queries,
    load_rows,
    row_shift,
    rows_from,
    rows_on,
    score_factor,
    score_gradients,
    span,
    statistics,
    store_rows,
    table_from,
    table_or,
)
from bert_fast.kernels.common import dot, dropout_numbers, precision, seed_or
from bert_fast.kernels.launch import kernel


@kernel(do_not_specialize=COUNTS)
def _forward(
    q, k, v,  # (total, heads, head_dim), any strides but the last
    bias,  # (3, heads, head_dim)
    table,  # (heads, table_rows, table_cols), the position bias, columns in whole blocks
    out,  # (total_q, heads, head_dim)
    lse,  # (heads, total_q) float32
    cu_q, cu_k,  # (batch + 1,) int32
    seed,  # (1,) int64
    q_stride, q_head, k_stride, k_head, v_stride, v_head, out_stride, out_head,
    batch, total_q, heads, table_rows, table_cols, scale, cut, keep_scale,
    NEGATIVE: tl.constexpr,  # the scale is
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # all keys of every sequence fit one block: nothing is rescaled
    PARTS: tl.constexpr,  # of a row's sums in the loop
    TENSOR_CORES: tl.constexpr,  # else plain FMA
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of queries, heads)."""
    sequence, q_begin, q_length, first = find(cu_q, batch, total_q, BLOCK_M)
    if first >= q_length:
        return
    k_begin, k_length = span(cu_k, sequence, batch)
    queries = load_queries(rows_from(q, q_begin + first, q_stride, q_head), q_length - first,
                           q_stride, bias, heads, HAS_BIAS, HEAD_DIM, BLOCK_D, BLOCK_M,
                           True)  # fmt: skip
    if NEGATIVE:  # a row's largest score is to be the scale times its largest product
        queries, scale = -queries, -scale
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    norm = tl.zeros((BLOCK_M, PARTS), tl.float32)
    left = tl.zeros((BLOCK_M, PARTS), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    factor = score_factor(scale)
    if HAS_BIAS and TENSOR_CORES:  # or queries would stay for it a second time
        shift_of_k = row_shift(queries, bias, heads, factor, HEAD_DIM, BLOCK_D)
    keys_at = rows_from(k, k_begin, k_stride, k_head)
    values_at = rows_from(v, k_begin, v_stride, v_head)
    table_at = table_from(table, first, 0, table_rows, table_cols)
    last, whole = keys_seen(first, q_length, k_length, CAUSAL, BLOCK_M, BLOCK_N)
    if ONE_BLOCK:
        tl.device_assert(k_length <= BLOCK_N, "max_seqlen is below the longest sequence")
        last, whole = tl.minimum(last, 1), 0  # one turn of a loop, if there are keys at all
    else:
        for begin in range(0, whole, BLOCK_N):
            top, norm, left, total = attend(
                queries, top, norm, left, total, keys_at, values_at, table_at, seed, first, begin,
                q_length, k_length, k_stride, v_stride, table_cols, factor, cut, sequence, False,
                CAUSAL, DROPOUT, HAS_BIAS, HAS_TABLE, ONE_BLOCK, PARTS, HEAD_DIM, BLOCK_D, BLOCK_M,
                BLOCK_N, PRECISION,
            )  # fmt: skip
            keys_at += rows_on(k_stride, BLOCK_N)
            values_at += rows_on(v_stride, BLOCK_N)
            table_at += BLOCK_N
    for begin in tl.range(whole, last, BLOCK_N, num_stages=1):
        top, norm, left, total = attend(
            queries, top, norm, left, total, keys_at, values_at, table_at, seed, first, begin,
            q_length, k_length, k_stride, v_stride, table_cols, factor, cut, sequence, True, CAUSAL,
            DROPOUT, HAS_BIAS, HAS_TABLE, ONE_BLOCK, PARTS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            PRECISION,
        )  # fmt: skip
        keys_at += rows_on(k_stride, BLOCK_N)
        values_at += rows_on(v_stride, BLOCK_N)
        table_at += BLOCK_N
    norm = tl.sum(norm, 1)
    if HAS_BIAS:  # v's is the same in all that is summed, k's in all scores of a row
        shift = load_bias(bias, 2, heads, HEAD_DIM, BLOCK_D)
        kept = tl.sum(left, 1) if DROPOUT else norm
        total += kept[:, None] * shift[None, :]
        if not TENSOR_CORES:
            shift_of_k = row_shift(queries, bias, heads, factor, HEAD_DIM, BLOCK_D)
        top += shift_of_k
        total += 0.0 * shift_of_k[:, None]  # NaN and infinity are not to cancel
    share = tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)
    if DROPOUT:
        share *= keep_scale
    store_rows(rows_from(out, q_begin + first, out_stride, out_head), total * share[:, None],
               q_length - first, out_stride, HEAD_DIM, BLOCK_D, BLOCK_M)  # fmt: skip
    log = tl.where(norm > 0, (top + tl.log2(tl.where(norm > 0, norm, 1.0))) * LN2, float("-inf"))
    row = first + tl.arange(0, BLOCK_M)
    tl.store(lse + tl.program_id(1).to(tl.int64) * total_q + q_begin + row, log, row < q_length)


@triton.jit
def _add_keys(
    total, queries, douts, keys_at, values_at, table_at, seed, log, center, extra, first, begin,
    q_length, k_length, k_stride, v_stride, table_cols, factor, cut, keep_scale, sequence,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total of the tile of queries from ``first`` plus what the keys from ``begin`` add to it."""
    keys = load_rows(keys_at, k_length - begin, k_stride, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED,
                     DROPOUT)  # fmt: skip
    values = load_rows(values_at, k_length - begin, v_stride, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED,
                       DROPOUT)  # fmt: skip
    _, dscores = score_gradients(
        queries, keys, values, douts, log, center, extra, table_at, seed, first, begin, q_length,
        k_length, table_cols, factor, cut, keep_scale, sequence, MASKED, CAUSAL, DROPOUT, HAS_BIAS,
        HAS_TABLE, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    return dot(dscores.to(keys.dtype), keys, total, PRECISION)


@kernel(do_not_specialize=COUNTS)
def _backward_q(
    dout, q, k, v, bias, table, out, lse,
    work,  # (3, heads, total_q) float32, what a row's tile finds for the other kernels
    dq, cu_q, cu_k, seed,
    dout_stride, dout_head, q_stride, q_head, k_stride, k_head, v_stride, v_head, out_stride,
    out_head, dq_stride, dq_head, batch, total_q, heads, table_rows, table_cols, scale, cut,
    keep_scale,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries, and their part of ``work``. Grid: (tiles of queries, heads)."""
    sequence, q_begin, q_length, first = find(cu_q, batch, total_q, BLOCK_M)
    if first >= q_length:
        return
    k_begin, k_length = span(cu_k, sequence, batch)
    queries = load_queries(rows_from(q, q_begin + first, q_stride, q_head), q_length - first,
                           q_stride, bias, heads, HAS_BIAS, HEAD_DIM, BLOCK_D, BLOCK_M,
                           True)  # fmt: skip
    douts = load_rows(rows_from(dout, q_begin + first, dout_stride, dout_head), q_length - first,
                      dout_stride, HEAD_DIM, BLOCK_D, BLOCK_M, True)  # fmt: skip
    factor = score_factor(scale)
    log, center, extra = find_statistics(
        queries, douts, out, lse, work, bias, q_begin, first, q_length, out_stride, out_head,
        total_q, heads, factor, DROPOUT, HAS_BIAS, HEAD_DIM, BLOCK_D, BLOCK_M, True,
    )  # fmt: skip
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    keys_at = rows_from(k, k_begin, k_stride, k_head)
    values_at = rows_from(v, k_begin, v_stride, v_head)
    table_at = table_from(table, first, 0, table_rows, table_cols)
    last, whole = keys_seen(first, q_length, k_length, CAUSAL, BLOCK_M, BLOCK_N)
    for begin in range(0, whole, BLOCK_N):
        total = _add_keys(
            total, queries, douts, keys_at, values_at, table_at, seed, log, center, extra, first,
            begin, q_length, k_length, k_stride, v_stride, table_cols, factor, cut, keep_scale,
            sequence, False, CAUSAL, DROPOUT, HAS_BIAS, HAS_TABLE, HEAD_DIM, BLOCK_D, BLOCK_M,
            BLOCK_N, PRECISION,
        )  # fmt: skip
        keys_at += rows_on(k_stride, BLOCK_N)
        values_at += rows_on(v_stride, BLOCK_N)
        table_at += BLOCK_N
    for begin in tl.range(whole, last, BLOCK_N, num_stages=1):
        total = _add_keys(
            total, queries, douts, keys_at, values_at, table_at, seed, log, center, extra, first,
            begin, q_length, k_length, k_stride, v_stride, table_cols, factor, cut, keep_scale,
            sequence, True, CAUSAL, DROPOUT, HAS_BIAS, HAS_TABLE, HEAD_DIM, BLOCK_D, BLOCK_M,
            BLOCK_N, PRECISION,
        )  # fmt: skip
        keys_at += rows_on(k_stride, BLOCK_N)
        values_at += rows_on(v_stride, BLOCK_N)
        table_at += BLOCK_N
    store_rows(rows_from(dq, q_begin + first, dq_stride, dq_head), total * scale, q_length - first,
               dq_stride, HEAD_DIM, BLOCK_D, BLOCK_M)  # fmt: skip


@triton.jit
def _add_queries(
    dkeys, dvalues, keys, values, douts_at, queries_at, work_at, table_at, bias, seed, first, begin,
    q_length, k_length, dout_stride, q_stride, total_q, heads, table_cols, factor, cut, keep_scale,
    sequence, MASKED: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dkeys and dvalues of the tile of keys from ``first`` plus what the queries from ``begin`` add
    to them."""
    queries = load_queries(queries_at, q_length - begin, q_stride, bias, heads, HAS_BIAS, HEAD_DIM,
                           BLOCK_D, BLOCK_M, MASKED)  # fmt: skip
    douts = load_rows(douts_at, q_length - begin, dout_stride, HEAD_DIM, BLOCK_D, BLOCK_M,
                      MASKED)  # fmt: skip
    log, center, extra = statistics(work_at, q_length - begin, total_q, heads,
                                    DROPOUT and HAS_BIAS, MASKED, BLOCK_M)  # fmt: skip
    # Keys past the last have rows of their own in dkeys and dvalues, which are not stored.
    dropped, dscores = score_gradients(
        queries, keys, values, douts, log, center, extra, table_at, seed, begin, first, q_length,
        k_length, table_cols, factor, cut, keep_scale, sequence, MASKED and CAUSAL, CAUSAL, DROPOUT,
        HAS_BIAS, HAS_TABLE, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    dvalues = dot(tl.trans(dropped.to(douts.dtype)), douts, dvalues, PRECISION)
    dkeys = dot(tl.trans(dscores.to(queries.dtype)), queries, dkeys, PRECISION)
    return dkeys, dvalues


@kernel(do_not_specialize=COUNTS)
def _backward_kv(
    dout, q, k, v, bias, table, work, dk, dv, cu_q, cu_k, seed,
    dout_stride, dout_head, q_stride, q_head, k_stride, k_head, v_stride, v_head, dk_stride,
    dk_head, dv_stride, dv_head, batch, total_q, total_k, heads, table_rows, table_cols, scale, cut,
    keep_scale,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys. Grid: (tiles of keys, heads)."""
    sequence, k_begin, k_length, first = find(cu_k, batch, total_k, BLOCK_N)
    if first >= k_length:
        return
    q_begin, q_length = span(cu_q, sequence, batch)
    keys = load_rows(rows_from(k, k_begin + first, k_stride, k_head), k_length - first, k_stride,
                     HEAD_DIM, BLOCK_D, BLOCK_N, True, DROPOUT)  # fmt: skip
    values = load_rows(rows_from(v, k_begin + first, v_stride, v_head), k_length - first, v_stride,
                       HEAD_DIM, BLOCK_D, BLOCK_N, True, DROPOUT)  # fmt: skip
    dkeys = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dvalues = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    factor = score_factor(scale)
    # The queries: hidden from some of the keys, then whole tiles that see all, then the last.
    start, hidden, whole = 0, 0, q_length // BLOCK_M * BLOCK_M
    if CAUSAL:
        ahead = first - (k_length - q_length)  # the first query that sees the tile's first key
        start = tl.maximum(0, ahead) // BLOCK_M * BLOCK_M
        hidden = (tl.maximum(0, ahead + BLOCK_N - 1) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        whole = tl.maximum(whole, hidden)
    douts_at = rows_from(dout, q_begin + hidden, dout_stride, dout_head)
    queries_at = rows_from(q, q_begin + hidden, q_stride, q_head)
    work += tl.program_id(1).to(tl.int64) * total_q + q_begin
    work_at = work + hidden
    table_at = table_from(table, hidden, first, table_rows, table_cols)
    for begin in range(hidden, whole, BLOCK_M):
        dkeys, dvalues = _add_queries(
            dkeys, dvalues, keys, values, douts_at, queries_at, work_at, table_at, bias, seed,
            first, begin, q_length, k_length, dout_stride, q_stride, total_q, heads, table_cols,
            factor, cut, keep_scale, sequence, False, CAUSAL, DROPOUT, HAS_BIAS, HAS_TABLE,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        douts_at += rows_on(dout_stride, BLOCK_M)
        queries_at += rows_on(q_stride, BLOCK_M)
        work_at += BLOCK_M
        table_at += rows_on(table_cols, BLOCK_M)
    for at in tl.range(start, q_length - (whole - hidden), BLOCK_M, num_stages=1):
        begin = tl.where(at < hidden, at, at + whole - hidden)
        dkeys, dvalues = _add_queries(
            dkeys, dvalues, keys, values, rows_from(dout, q_begin + begin, dout_stride, dout_head),
            rows_from(q, q_begin + begin, q_stride, q_head), work + begin,
            table_from(table, begin, first, table_rows, table_cols), bias, seed, first, begin,
            q_length, k_length, dout_stride, q_stride, total_q, heads, table_cols, factor, cut,
            keep_scale, sequence, True, CAUSAL, DROPOUT, HAS_BIAS, HAS_TABLE, HEAD_DIM, BLOCK_D,
            BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    store_rows(rows_from(dk, k_begin + first, dk_stride, dk_head), dkeys * scale, k_length - first,
               dk_stride, HEAD_DIM, BLOCK_D, BLOCK_N, DROPOUT)  # fmt: skip
    store_rows(rows_from(dv, k_begin + first, dv_stride, dv_head), dvalues, k_length - first,
               dv_stride, HEAD_DIM, BLOCK_D, BLOCK_N, DROPOUT)  # fmt: skip


def _strides(*tensors):
    return [stride for t in tensors for stride in t.stride()[:2]]


def _common(q, bias, table, causal, dropout_p):
    return {
        "CAUSAL": causal, "DROPOUT": dropout_p > 0, "HAS_BIAS": bias is not None,
        "HAS_TABLE": table is not None, "HEAD_DIM": q.shape[2], "PRECISION": precision(),
        "enable_fp_fusion": True,
    }  # fmt: skip


@on_own_device("triton")
def attention_forward(
    q, k, v, cu_q, cu_k, max_q, max_k, bias, scale, causal, dropout_p, seed, out=None,
    position_bias=None,
):  # fmt: skip
    cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    total_q, heads, head_dim = q.shape
    out = q.new_empty(q.shape) if out is None else out
    lse = torch.empty(heads, total_q, dtype=torch.float32, device=q.device)
    batch = cu_q.numel() - 1
    biased = position_bias is not None
    kind = dropout_p > 0, bias is not None, causal
    block_d, entry = settings("forward", biased, head_dim, q.dtype, q.device, max_k, *kind)
    parts = parts_of_sum(biased, q.device, *kind)
    tensor_cores = attention_settings.on_tensor_cores(q.dtype, q.device)
    table, *table_size = table_or(position_bias, q)

    def launch(chosen):
        BLOCK_M, BLOCK_N, warps, stages = chosen
        _forward[(total_q // BLOCK_M + batch + 1, heads)](
            q, k, v, q if bias is None else bias.contiguous(), table, out, lse, cu_q, cu_k,
            seed_or(seed, cu_q), *_strides(q, k, v, out), batch, total_q, heads, *table_size, scale,
            *dropout_numbers(dropout_p), NEGATIVE=scale < 0, ONE_BLOCK=max_k <= BLOCK_N,
            PARTS=1 if max_k <= BLOCK_N else parts, TENSOR_CORES=tensor_cores, BLOCK_D=block_d,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=warps, num_stages=stages,
            debug=True, sanitize_overflow=False,
            **_common(q, bias, position_bias, causal, dropout_p),
        )  # fmt: skip

    if q.numel():
        given = causal, bias, position_bias, dropout_p
        search = functools.partial(candidates, q, max_k, *given, tiles=1)
        tuning.run("attention.forward", entry, search, launch)
    return out, lse


@on_own_device("triton")
def attention_backward(
    dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, bias, scale, causal, dropout_p, seed,
    dq, dk, dv, position_bias=None, dposition_bias=None,
):  # fmt: skip
    cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    (total_q, heads, head_dim), total_k = q.shape, k.shape[0]
    batch = cu_q.numel() - 1
    kind = position_bias is not None, head_dim, q.dtype, q.device
    given = dropout_p > 0, bias is not None, causal
    block_d, short = settings("backward_short", *kind, max(max_q, max_k), *given)
    common = _common(q, bias, position_bias, causal, dropout_p) | {"BLOCK_D": block_d}
    search = functools.partial(
        candidates, q, max_k, causal, bias, position_bias, dropout_p, tiles=2
    )
    bias = q if bias is None else bias.contiguous()
    table, *table_size = table_or(position_bias, q)
    dropout = scale, *dropout_numbers(dropout_p)
    seed = seed_or(seed, cu_q)
    most = functools.partial(
        registers, biased=position_bias is not None, causal=causal, dtype=q.dtype
    )

    def launch_short(chosen):
        BLOCK_M, BLOCK_N, warps, stages = chosen
        attention_short.backward(
            (dout, q, k, v, bias, out, lse, dq, dk, dv), cu_q, cu_k, seed,
            _strides(dout, q, k, v, out, dq, dk, dv), batch, (heads, *dropout),
            {name: value for name, value in common.items() if name != "HAS_TABLE"},
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def search_short():  # the tile is to hold whole sequences
        return search()[0], [(*short[:2], warps, 1) for warps in (4, 8)]

    if short and position_bias is None and q.numel() + k.numel():
        tuning.run("attention.backward_short", short, search_short, launch_short)
        return
    work = lse.new_empty(3, *lse.shape)
    inputs, numbers = (dout, q, k, v, bias, table), (heads, *table_size, *dropout)
    entries = {
        name: settings(name, *kind, max_k, *given)[1]
        for name in ("backward_q", "backward_kv", "backward_table")
    }

    def launch_q(chosen):
        BLOCK_M, BLOCK_N, warps, stages = chosen
        _backward_q[(total_q // BLOCK_M + batch + 1, heads)](
            *inputs, out, lse, work, dq, cu_q, cu_k, seed, *_strides(dout, q, k, v, out, dq), batch,
            total_q, *numbers, **common, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=warps,
            num_stages=stages, maxnreg=most(warps),
        )  # fmt: skip

    def launch_kv(chosen):
        BLOCK_M, BLOCK_N, warps, stages = chosen
        _backward_kv[(total_k // BLOCK_N + batch + 1, heads)](
            *inputs, work, dk, dv, cu_q, cu_k, seed, *_strides(dout, q, k, v, dk, dv), batch,
            total_q, total_k, *numbers, **common, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=warps,
            num_stages=stages, maxnreg=most(warps),
        )  # fmt: skip

    def launch_table(chosen):
        BLOCK_M, BLOCK_N, warps, stages = chosen
        attention_table.backward(
            (*inputs, work), dposition_bias, cu_q, cu_k, seed, _strides(dout, q, k, v), batch,
            numbers, common | {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}, num_warps=warps,
            num_stages=stages, maxnreg=most(warps),
        )  # fmt: skip

    if q.numel():
        tuning.run("attention.backward_q", entries["backward_q"], search, launch_q)
    if k.numel():
        tuning.run("attention.backward_kv", entries["backward_kv"], search, launch_kv)
    if dposition_bias is not None and dposition_bias.numel():
        tuning.run("attention.backward_table", entries["backward_table"], search, launch_table)
