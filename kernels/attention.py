"""softmax(Q K^T * scale + B) V of packed sequences (Vaswani et al. 2017, eq. 1), and its gradient.

With S = scale Q K^T + B, B the position bias (or 0), P = softmax(S), Z dropout's mask / (1 - p) and
O = (P * Z) V, for each row:

    dV = (P * Z)^T dO        dP = (dO V^T) * Z        delta = rowsum(P * dP) = rowsum(dO * O)
    dS = P * (dP - delta)    dQ = scale dS K          dK = scale dS^T Q
    dB = the sum over all sequences of dS

(Dao et al. 2022, appendix B.2). Forward keeps O and lse, the log-sum-exp of a row of S; backward
recomputes P = exp(S - lse), draws the mask again, and is deterministic: one kernel owns a tile of
queries and makes dQ, another owns a tile of keys and makes dK and dV; attention_table.py has dB.

**No program for padding.** Tiles of BLOCK rows are numbered so that sequence s owns those from
cu[s] // BLOCK + s: a program finds its sequence by a search in cu_seqlens, with no table to build
and nothing to wait for, and there are at most batch + 1 tiles too many, which return at once.
The rows past the last sequence are one more, which sees no keys: zeros.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from bert_fast.devices import on_own_device
from bert_fast.kernels import attention_table, tuning
from bert_fast.kernels.attention_tiles import (
    COUNTS,
    LN2,
    LOG2E,
    TABLE_BLOCK,
    find,
    load_rows,
    plus_table,
    seen_pairs,
    span,
    statistics,
    store_rows,
)
from bert_fast.kernels.common import (
    capability,
    dot,
    keep_mask,
    precision,
    seed_or,
    threshold,
)
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
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # all keys of every sequence fit one block: nothing is rescaled
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
    head, row = tl.program_id(1), first + tl.arange(0, BLOCK_M)
    queries = load_rows(q, q_begin, row, q_length, q_stride, q_head, bias, 0, heads, HAS_BIAS,
                        HEAD_DIM, BLOCK_D)  # fmt: skip
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last = k_length
    if CAUSAL:
        last = tl.minimum(last, first + BLOCK_M + k_length - q_length)
    if ONE_BLOCK:
        tl.device_assert(k_length <= BLOCK_N, "max_seqlen is below the longest sequence")
        last = tl.minimum(last, 1)  # one turn of the loop, if there are keys at all
    for begin in range(0, last, BLOCK_N):
        col = begin + tl.arange(0, BLOCK_N)
        keys = load_rows(k, k_begin, col, k_length, k_stride, k_head, bias, 1, heads, HAS_BIAS,
                         HEAD_DIM, BLOCK_D)  # fmt: skip
        scores = dot(queries, tl.trans(keys), None, PRECISION) * (scale * LOG2E)
        seen = seen_pairs(row, col, q_length, k_length, CAUSAL)
        if HAS_TABLE:
            scores = plus_table(scores, table, first, row, col, q_length, table_rows, table_cols)
        scores = tl.where(seen, scores, float("-inf"))
        block_top = tl.max(scores, 1)
        new_top = block_top if ONE_BLOCK else tl.maximum(top, block_top)
        # A row that has seen no key yet: any finite number will do, its weights are zero.
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - finite[:, None])
        if ONE_BLOCK:
            norm = tl.sum(weights, 1)
        else:
            shrink = tl.exp2(top - finite)
            norm = norm * shrink + tl.sum(weights, 1)
            total *= shrink[:, None]
        top = new_top
        if DROPOUT:
            keep = keep_mask(tl.load(seed), cut, row, begin // 4, head, sequence, BLOCK_M,
                             BLOCK_N // 4)  # fmt: skip
            weights = tl.where(keep, weights, 0.0)
        values = load_rows(v, k_begin, col, k_length, v_stride, v_head, bias, 2, heads, HAS_BIAS,
                           HEAD_DIM, BLOCK_D)  # fmt: skip
        if ONE_BLOCK:
            total = dot(weights.to(values.dtype), values, None, PRECISION)
        else:
            total = dot(weights.to(values.dtype), values, total, PRECISION)
    share = tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)
    if DROPOUT:
        share *= keep_scale
    store_rows(out, total * share[:, None], q_begin, row, q_length, out_stride, out_head, HEAD_DIM,
               BLOCK_D)  # fmt: skip
    log = tl.where(norm > 0, (top + tl.log2(tl.where(norm > 0, norm, 1.0))) * LN2, float("-inf"))
    tl.store(lse + head.to(tl.int64) * total_q + q_begin + row, log, row < q_length)


@kernel(do_not_specialize=COUNTS)
def _delta(
    dout, out,  # (total_q, heads, head_dim)
    delta,  # (heads, total_q) float32
    dout_stride, dout_head, out_stride, out_head, total_q,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O). Grid: (blocks of rows, heads)."""
    begin, row = tl.program_id(0) * BLOCK, tl.arange(0, BLOCK)
    left = total_q - begin
    x = load_rows( dout, begin, row, left, dout_stride, dout_head, dout, 0, 1, False, HEAD_DIM,
                  BLOCK_D )  # fmt: skip
    y = load_rows(out, begin, row, left, out_stride, out_head, out, 0, 1, False, HEAD_DIM, BLOCK_D)
    total = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    at = delta + tl.program_id(1).to(tl.int64) * total_q + begin
    tl.store(at + row, total, row < left)


@kernel(do_not_specialize=COUNTS)
def _backward_q(
    dout, q, k, v, bias, table, lse, delta, dq, cu_q, cu_k, seed,
    dout_stride, dout_head, q_stride, q_head, k_stride, k_head, v_stride, v_head, dq_stride,
    dq_head, batch, total_q, heads, table_rows, table_cols, scale, cut, keep_scale,
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
    """dq of a tile of queries. Grid: (tiles of queries, heads)."""
    sequence, q_begin, q_length, first = find(cu_q, batch, total_q, BLOCK_M)
    if first >= q_length:
        return
    k_begin, k_length = span(cu_k, sequence, batch)
    head, row = tl.program_id(1), first + tl.arange(0, BLOCK_M)
    queries = load_rows(q, q_begin, row, q_length, q_stride, q_head, bias, 0, heads, HAS_BIAS,
                        HEAD_DIM, BLOCK_D)  # fmt: skip
    douts = load_rows(dout, q_begin, row, q_length, dout_stride, dout_head, bias, 0, heads, False,
                      HEAD_DIM, BLOCK_D)  # fmt: skip
    log, center = statistics(lse, delta, q_begin, row, q_length, total_q)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last = k_length
    if CAUSAL:
        last = tl.minimum(last, first + BLOCK_M + k_length - q_length)
    for begin in range(0, last, BLOCK_N):
        col = begin + tl.arange(0, BLOCK_N)
        keys = load_rows(k, k_begin, col, k_length, k_stride, k_head, bias, 1, heads, HAS_BIAS,
                         HEAD_DIM, BLOCK_D)  # fmt: skip
        values = load_rows(v, k_begin, col, k_length, v_stride, v_head, bias, 2, heads, HAS_BIAS,
                           HEAD_DIM, BLOCK_D)  # fmt: skip
        scores = dot(queries, tl.trans(keys), None, PRECISION) * (scale * LOG2E)
        seen = seen_pairs(row, col, q_length, k_length, CAUSAL)
        if HAS_TABLE:
            scores = plus_table(scores, table, first, row, col, q_length, table_rows, table_cols)
        weights = tl.where(seen, tl.exp2(scores - log[:, None]), 0.0)
        dweights = dot(douts, tl.trans(values), None, PRECISION)
        if DROPOUT:
            keep = keep_mask(tl.load(seed), cut, row, begin // 4, head, sequence, BLOCK_M,
                             BLOCK_N // 4)  # fmt: skip
            dweights = tl.where(keep, dweights * keep_scale, 0.0)
        dscores = weights * (dweights - center[:, None])
        total = dot(dscores.to(keys.dtype), keys, total, PRECISION)
    store_rows(dq, total * scale, q_begin, row, q_length, dq_stride, dq_head, HEAD_DIM, BLOCK_D)


@kernel(do_not_specialize=COUNTS)
def _backward_kv(
    dout, q, k, v, bias, table, lse, delta, dk, dv, cu_q, cu_k, seed,
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
    head, col = tl.program_id(1), first + tl.arange(0, BLOCK_N)
    keys = load_rows(k, k_begin, col, k_length, k_stride, k_head, bias, 1, heads, HAS_BIAS,
                     HEAD_DIM, BLOCK_D)  # fmt: skip
    values = load_rows(v, k_begin, col, k_length, v_stride, v_head, bias, 2, heads, HAS_BIAS,
                       HEAD_DIM, BLOCK_D)  # fmt: skip
    dkeys = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dvalues = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    start = 0
    if CAUSAL:  # the first query that sees the tile's first key
        start = tl.maximum(0, first - (k_length - q_length)) // BLOCK_M * BLOCK_M
    for begin in range(start, q_length, BLOCK_M):
        row = begin + tl.arange(0, BLOCK_M)
        queries = load_rows(q, q_begin, row, q_length, q_stride, q_head, bias, 0, heads, HAS_BIAS,
                            HEAD_DIM, BLOCK_D)  # fmt: skip
        douts = load_rows(dout, q_begin, row, q_length, dout_stride, dout_head, bias, 0, heads,
                          False, HEAD_DIM, BLOCK_D)  # fmt: skip
        log, center = statistics(lse, delta, q_begin, row, q_length, total_q)
        scores = dot(queries, tl.trans(keys), None, PRECISION) * (scale * LOG2E)
        seen = seen_pairs(row, col, q_length, k_length, CAUSAL)
        if HAS_TABLE:
            scores = plus_table(scores, table, begin, row, col, q_length, table_rows, table_cols)
        weights = tl.where(seen, tl.exp2(scores - log[:, None]), 0.0)
        dweights = dot(douts, tl.trans(values), None, PRECISION)
        dropped = weights
        if DROPOUT:
            keep = keep_mask(tl.load(seed), cut, row, first // 4, head, sequence, BLOCK_M,
                             BLOCK_N // 4)  # fmt: skip
            dropped = tl.where(keep, weights * keep_scale, 0.0)
            dweights = tl.where(keep, dweights * keep_scale, 0.0)
        dvalues = dot(tl.trans(dropped.to(douts.dtype)), douts, dvalues, PRECISION)
        dscores = weights * (dweights - center[:, None])
        dkeys = dot(tl.trans(dscores.to(queries.dtype)), queries, dkeys, PRECISION)
    store_rows(dk, dkeys * scale, k_begin, col, k_length, dk_stride, dk_head, HEAD_DIM, BLOCK_D)
    store_rows(dv, dvalues, k_begin, col, k_length, dv_stride, dv_head, HEAD_DIM, BLOCK_D)


# The padded head_dim -> BLOCK_M, BLOCK_N, warps, stages; plain FMA (float32, and any dtype before
# 8.0) apart, then by chip: 90 and 100 have instructions of 64 rows, the others share mma.sync. What
# spills no register and fits every chip's shared memory (`bert-fast inspect`); no time has been
# measured yet.
FORWARD = {
    "fma": {32: (64, 32, 8, 2), 64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 16, 1)},
    "mma": {32: (64, 64, 4, 3), 64: (64, 32, 4, 3), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
    90: {32: (128, 64, 8, 3), 64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
    100: {32: (128, 64, 8, 3), 64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
}
BACKWARD = {
    "fma": {32: (32, 32, 8, 1), 64: (32, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 16, 1)},
    "mma": {32: (64, 32, 4, 2), 64: (64, 32, 4, 2), 128: (64, 32, 8, 1), 256: (16, 32, 8, 1)},
    90: {32: (64, 64, 4, 2), 64: (64, 64, 8, 2), 128: (64, 32, 8, 1), 256: (32, 32, 8, 1)},
    100: {32: (64, 64, 4, 2), 64: (64, 64, 8, 2), 128: (64, 64, 8, 1), 256: (32, 32, 8, 1)},
}


# Forward on tensor cores, head_dim <= 64, where no sequence is longer than this: one block of keys.
SHORT = {64: (64, 64, 4, 1), 128: (128, 128, 8, 1)}


# With a position bias, which takes registers: in the same form, and found in the same way. (Causal,
# with dropout, in float32 and heads of 256, two registers spill in attention_table.py.)
FORWARD_BIASED = {
    "fma": {32: (32, 32, 8, 2), 64: (16, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 16, 1)},
    "mma": {32: (32, 64, 4, 3), 64: (32, 32, 4, 3), 128: (32, 32, 8, 2), 256: (16, 32, 8, 1)},
    90: {32: (64, 64, 8, 3), 64: (64, 64, 8, 3), 128: (64, 32, 8, 2), 256: (64, 32, 8, 1)},
    100: {32: (64, 64, 8, 3), 64: (64, 64, 8, 3), 128: (64, 32, 8, 2), 256: (64, 32, 8, 1)},
}
BACKWARD_BIASED = {
    "fma": {32: (32, 32, 8, 1), 64: (16, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 16, 1)},
    "mma": {32: (64, 32, 8, 1), 64: (64, 32, 8, 1), 128: (64, 32, 8, 1), 256: (16, 32, 8, 1)},
    90: {32: (64, 64, 8, 1), 64: (64, 64, 8, 1), 128: (64, 32, 8, 1), 256: (16, 32, 8, 1)},
    100: {32: (64, 64, 8, 1), 64: (64, 32, 8, 1), 128: (64, 32, 8, 1), 256: (16, 32, 8, 1)},
}
SHORT_BIASED = {64: (64, 64, 8, 1), 128: (64, 128, 8, 1)}


def settings(backward, biased, head_dim, dtype, device, longest):
    """BLOCK_D and the entry for it, of the tables above."""
    table, short = (FORWARD_BIASED, SHORT_BIASED) if biased else (FORWARD, SHORT)
    if backward:
        table, short = BACKWARD_BIASED if biased else BACKWARD, {}
    block_d, chip = max(32, triton.next_power_of_2(head_dim)), capability(device)
    fma = dtype == torch.float32 or chip < 80  # Triton has no tensor-core instruction for 7.5
    kind = "fma" if fma else chip if chip in table else "mma"
    if not fma and block_d <= 64:
        for most, entry in short.items():
            if longest <= most:
                return block_d, *entry
    return block_d, *table[kind][block_d]


def _registers(warps):
    """All that 16 warps can have: left alone, ptxas stops at half of them, and spills."""
    return 128 if warps == 16 else None


def _strides(*tensors):
    return [stride for t in tensors for stride in (t.stride(0), t.stride(1))]


def _common(q, bias, table, causal, dropout_p):
    return {
        "CAUSAL": causal, "DROPOUT": dropout_p > 0, "HAS_BIAS": bias is not None,
        "HAS_TABLE": table is not None, "HEAD_DIM": q.shape[2], "PRECISION": precision(),
        "enable_fp_fusion": True,
    }  # fmt: skip


def _table_or(table, other):
    """The position bias in whole blocks of columns, and its rows and columns; without one a pointer
    must be given all the same."""
    if table is None:
        return other, 0, 0
    if missing := -table.shape[2] % TABLE_BLOCK.value:
        table = F.pad(table, (0, missing))
    return table.contiguous(), *table.shape[1:]


def _search(q, longest, causal, bias, table, dropout_p, tiles):
    """What BERT_FAST_AUTOTUNE needs: what the fastest settings depend on (lengths by powers of
    two), and those it tries beside the table, for so many ``tiles`` of each block's rows."""
    block_d = max(32, triton.next_power_of_2(q.shape[2]))
    longest = triton.next_power_of_2(max(longest, 1))
    given = bias is not None, table is not None, dropout_p > 0
    kind = q.dtype, q.shape[1:], longest, causal, *given
    blocks = [(128, 128), (128, 64), (64, 128), (64, 64), (64, 32), (32, 32)]
    fitting = [pair for pair in blocks if sum(pair) * block_d * tiles <= 32768] or [(32, 32)]
    return kind, [(*p, warps, stages) for p in fitting for warps in (4, 8) for stages in (1, 2, 3)]


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
    block_d, *entry = settings(False, biased, head_dim, q.dtype, q.device, max_k)
    table, *table_size = _table_or(position_bias, q)

    def launch(chosen):
        BLOCK_M, BLOCK_N, warps, stages = chosen
        _forward[(total_q // BLOCK_M + batch + 1, heads)](
            q, k, v, q if bias is None else bias.contiguous(), table, out, lse, cu_q, cu_k,
            seed_or(seed, cu_q), *_strides(q, k, v, out), batch, total_q, heads, *table_size, scale,
            threshold(dropout_p), 1.0 / (1.0 - dropout_p), ONE_BLOCK=max_k <= BLOCK_N,
            BLOCK_D=block_d, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=warps, num_stages=stages,
            debug=True, sanitize_overflow=False,
            **_common(q, bias, position_bias, causal, dropout_p),
        )  # fmt: skip

    if q.numel():
        given = causal, bias, position_bias, dropout_p
        search = functools.partial(_search, q, max_k, *given, tiles=1)
        tuning.run("attention.forward", tuple(entry), search, launch)
    return out, lse


@on_own_device("triton")
def attention_backward(
    dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, bias, scale, causal, dropout_p, seed,
    dq, dk, dv, position_bias=None, dposition_bias=None,
):  # fmt: skip
    cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    (total_q, heads, head_dim), total_k = q.shape, k.shape[0]
    batch = cu_q.numel() - 1
    biased = position_bias is not None
    block_d, *entry = settings(True, biased, head_dim, q.dtype, q.device, max_k)
    entry, delta = tuple(entry), torch.empty_like(lse)
    common = _common(q, bias, position_bias, causal, dropout_p) | {"BLOCK_D": block_d}
    search = functools.partial(_search, q, max_k, causal, bias, position_bias, dropout_p, tiles=2)
    bias = q if bias is None else bias.contiguous()
    table, *table_size = _table_or(position_bias, q)
    inputs = dout, q, k, v, bias, table, lse, delta
    numbers = heads, *table_size, scale, threshold(dropout_p), 1.0 / (1.0 - dropout_p)
    seed = seed_or(seed, cu_q)

    def launch_q(chosen):
        BLOCK_M, BLOCK_N, warps, stages = chosen
        _backward_q[(total_q // BLOCK_M + batch + 1, heads)](
            *inputs, dq, cu_q, cu_k, seed, *_strides(dout, q, k, v, dq), batch, total_q, *numbers,
            **common, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=warps, num_stages=stages,
            maxnreg=_registers(warps),
        )  # fmt: skip

    def launch_kv(chosen):
        BLOCK_M, BLOCK_N, warps, stages = chosen
        _backward_kv[(total_k // BLOCK_N + batch + 1, heads)](
            *inputs, dk, dv, cu_q, cu_k, seed, *_strides(dout, q, k, v, dk, dv), batch, total_q,
            total_k, *numbers, **common, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=warps,
            num_stages=stages, maxnreg=_registers(warps),
        )  # fmt: skip

    def launch_table(chosen):
        BLOCK_M, BLOCK_N, warps, stages = chosen
        attention_table.backward(
            inputs, dposition_bias, cu_q, cu_k, seed, _strides(dout, q, k, v), batch, numbers,
            common | {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}, num_warps=warps, num_stages=stages,
            maxnreg=_registers(warps),
        )  # fmt: skip

    if q.numel():
        block = 2048 // block_d
        _delta[(triton.cdiv(total_q, block), heads)](
            dout, out, delta, *_strides(dout, out), total_q, HEAD_DIM=head_dim, BLOCK_D=block_d,
            BLOCK=block, enable_fp_fusion=True,
        )  # fmt: skip
        tuning.run("attention.backward_q", entry, search, launch_q)
    if k.numel():
        tuning.run("attention.backward_kv", entry, search, launch_kv)
    if dposition_bias is not None and dposition_bias.numel():
        tuning.run("attention.backward_table", entry, search, launch_table)
