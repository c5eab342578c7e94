"""softmax(Q K^T * scale) V of packed sequences (Vaswani et al. 2017, eq. 1), and its gradient.

With S = scale Q K^T, P = softmax(S), Z dropout's mask / (1 - p) and O = (P * Z) V, for each row:

    dV = (P * Z)^T dO        dP = (dO V^T) * Z        delta = rowsum(P * dP) = rowsum(dO * O)
    dS = P * (dP - delta)    dQ = scale dS K          dK = scale dS^T Q

(Dao et al. 2022, appendix B.2). Forward keeps O and lse, the log-sum-exp of a row of S; backward
recomputes P = exp(S - lse), draws the mask again, and is deterministic: one kernel owns a tile of
queries and makes dQ, another owns a tile of keys and makes dK and dV.

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
from bert_fast.kernels import tuning
from bert_fast.kernels.common import capability, dot, keep_mask, precision, seed_or, threshold

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# They differ in every batch: nothing recompiles for them.
COUNTS = ["batch", "total_q", "total_k", "cut"]


@triton.jit
def _find(cu, batch, total, BLOCK: tl.constexpr):
    """Of this program's tile: its sequence, that sequence's first row and length, and the tile's
    first row in it."""
    tile = tl.program_id(0)
    low, high = 0, batch  # the last s with cu[s] // BLOCK + s <= tile; s = batch: the rows after
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu + middle) // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle - 1
    begin = tl.load(cu + low)
    end = total
    if low < batch:
        end = tl.load(cu + low + 1)
    return low, begin, end - begin, (tile - begin // BLOCK - low) * BLOCK


@triton.jit
def _span(cu, sequence, batch):
    """First row and length of the sequence on the other side; none for the rows after the last."""
    begin = tl.load(cu + sequence)
    end = begin
    if sequence < batch:
        end = tl.load(cu + sequence + 1)
    return begin, end - begin


@triton.jit
def _rows(base, begin, row, length, stride, head_stride, bias, part, heads, HAS_BIAS: tl.constexpr,
          HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows of one head, (rows, BLOCK_D), plus its bias; zeros outside."""
    head, d = tl.program_id(1), tl.arange(0, BLOCK_D)
    inside = (row < length)[:, None] & (d < HEAD_DIM)[None, :]
    # 64 bits to the row: a sequence may have more than 2^31 elements.
    first = base + begin.to(tl.int64) * stride + head.to(tl.int64) * head_stride
    x = tl.load(first + row.to(tl.int64)[:, None] * stride + d[None, :], inside, 0.0)
    if HAS_BIAS:
        shift = tl.load(bias + (part * heads + head) * HEAD_DIM + d, d < HEAD_DIM, 0.0)
        x = tl.where(inside, x.to(tl.float32) + shift.to(tl.float32)[None, :], 0.0).to(x.dtype)
    return x


@triton.jit
def _store_rows(base, x, begin, row, length, stride, head_stride, HEAD_DIM: tl.constexpr,
                BLOCK_D: tl.constexpr):  # fmt: skip
    head, d = tl.program_id(1), tl.arange(0, BLOCK_D)
    inside = (row < length)[:, None] & (d < HEAD_DIM)[None, :]
    first = base + begin.to(tl.int64) * stride + head.to(tl.int64) * head_stride
    at = first + row.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, x.to(base.dtype.element_ty), inside)


@triton.jit
def _seen(row, col, q_length, k_length, CAUSAL: tl.constexpr):
    """Which (row, col) pairs count. Causal is aligned to the last query and the last key."""
    seen = (row < q_length)[:, None] & (col < k_length)[None, :]
    if CAUSAL:
        seen &= col[None, :] <= row[:, None] + (k_length - q_length)
    return seen


@triton.jit(do_not_specialize=COUNTS)
def _forward(
    q, k, v,  # (total, heads, head_dim), any strides but the last
    bias,  # (3, heads, head_dim)
    out,  # (total_q, heads, head_dim)
    lse,  # (heads, total_q) float32
    cu_q, cu_k,  # (batch + 1,) int32
    seed,  # (1,) int64
    q_stride, q_head, k_stride, k_head, v_stride, v_head, out_stride, out_head,
    batch, total_q, heads, scale, cut, keep_scale,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # all keys of every sequence fit one block: nothing is rescaled
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of queries, heads)."""
    sequence, q_begin, q_length, first = _find(cu_q, batch, total_q, BLOCK_M)
    if first >= q_length:
        return
    k_begin, k_length = _span(cu_k, sequence, batch)
    head, row = tl.program_id(1), first + tl.arange(0, BLOCK_M)
    queries = _rows(q, q_begin, row, q_length, q_stride, q_head, bias, 0, heads, HAS_BIAS,
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
        keys = _rows(k, k_begin, col, k_length, k_stride, k_head, bias, 1, heads, HAS_BIAS,
                     HEAD_DIM, BLOCK_D)  # fmt: skip
        scores = dot(queries, tl.trans(keys), None, PRECISION) * (scale * LOG2E)
        seen = _seen(row, col, q_length, k_length, CAUSAL)
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
        values = _rows(v, k_begin, col, k_length, v_stride, v_head, bias, 2, heads, HAS_BIAS,
                       HEAD_DIM, BLOCK_D)  # fmt: skip
        if ONE_BLOCK:
            total = dot(weights.to(values.dtype), values, None, PRECISION)
        else:
            total = dot(weights.to(values.dtype), values, total, PRECISION)
    share = tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)
    if DROPOUT:
        share *= keep_scale
    _store_rows(out, total * share[:, None], q_begin, row, q_length, out_stride, out_head,
                HEAD_DIM, BLOCK_D)  # fmt: skip
    log = tl.where(norm > 0, (top + tl.log2(tl.where(norm > 0, norm, 1.0))) * LN2, float("-inf"))
    tl.store(lse + head.to(tl.int64) * total_q + q_begin + row, log, row < q_length)


@triton.jit(do_not_specialize=COUNTS)
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
    x = _rows(dout, begin, row, left, dout_stride, dout_head, dout, 0, 1, False, HEAD_DIM, BLOCK_D)
    y = _rows(out, begin, row, left, out_stride, out_head, out, 0, 1, False, HEAD_DIM, BLOCK_D)
    total = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    at = delta + tl.program_id(1).to(tl.int64) * total_q + begin
    tl.store(at + row, total, row < left)


@triton.jit
def _statistics(lse, delta, begin, row, length, total_q):
    """lse in base 2 (+inf where a row saw no key, so that its weights are zero) and delta."""
    at = tl.program_id(1).to(tl.int64) * total_q + begin + row
    log = tl.load(lse + at, row < length, float("-inf")) * LOG2E
    log = tl.where(log == float("-inf"), float("inf"), log)
    return log, tl.load(delta + at, row < length, 0.0)


@triton.jit(do_not_specialize=COUNTS)
def _backward_q(
    dout, q, k, v, bias, lse, delta, dq, cu_q, cu_k, seed,
    dout_stride, dout_head, q_stride, q_head, k_stride, k_head, v_stride, v_head, dq_stride,
    dq_head, batch, total_q, heads, scale, cut, keep_scale,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries. Grid: (tiles of queries, heads)."""
    sequence, q_begin, q_length, first = _find(cu_q, batch, total_q, BLOCK_M)
    if first >= q_length:
        return
    k_begin, k_length = _span(cu_k, sequence, batch)
    head, row = tl.program_id(1), first + tl.arange(0, BLOCK_M)
    queries = _rows(q, q_begin, row, q_length, q_stride, q_head, bias, 0, heads, HAS_BIAS,
                    HEAD_DIM, BLOCK_D)  # fmt: skip
    douts = _rows(dout, q_begin, row, q_length, dout_stride, dout_head, bias, 0, heads, False,
                  HEAD_DIM, BLOCK_D)  # fmt: skip
    log, center = _statistics(lse, delta, q_begin, row, q_length, total_q)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last = k_length
    if CAUSAL:
        last = tl.minimum(last, first + BLOCK_M + k_length - q_length)
    for begin in range(0, last, BLOCK_N):
        col = begin + tl.arange(0, BLOCK_N)
        keys = _rows(k, k_begin, col, k_length, k_stride, k_head, bias, 1, heads, HAS_BIAS,
                     HEAD_DIM, BLOCK_D)  # fmt: skip
        values = _rows(v, k_begin, col, k_length, v_stride, v_head, bias, 2, heads, HAS_BIAS,
                       HEAD_DIM, BLOCK_D)  # fmt: skip
        scores = dot(queries, tl.trans(keys), None, PRECISION) * (scale * LOG2E)
        seen = _seen(row, col, q_length, k_length, CAUSAL)
        weights = tl.where(seen, tl.exp2(scores - log[:, None]), 0.0)
        dweights = dot(douts, tl.trans(values), None, PRECISION)
        if DROPOUT:
            keep = keep_mask(tl.load(seed), cut, row, begin // 4, head, sequence, BLOCK_M,
                             BLOCK_N // 4)  # fmt: skip
            dweights = tl.where(keep, dweights * keep_scale, 0.0)
        dscores = weights * (dweights - center[:, None])
        total = dot(dscores.to(keys.dtype), keys, total, PRECISION)
    _store_rows(dq, total * scale, q_begin, row, q_length, dq_stride, dq_head, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=COUNTS)
def _backward_kv(
    dout, q, k, v, bias, lse, delta, dk, dv, cu_q, cu_k, seed,
    dout_stride, dout_head, q_stride, q_head, k_stride, k_head, v_stride, v_head, dk_stride,
    dk_head, dv_stride, dv_head, batch, total_q, total_k, heads, scale, cut, keep_scale,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys. Grid: (tiles of keys, heads)."""
    sequence, k_begin, k_length, first = _find(cu_k, batch, total_k, BLOCK_N)
    if first >= k_length:
        return
    q_begin, q_length = _span(cu_q, sequence, batch)
    head, col = tl.program_id(1), first + tl.arange(0, BLOCK_N)
    keys = _rows(k, k_begin, col, k_length, k_stride, k_head, bias, 1, heads, HAS_BIAS, HEAD_DIM,
                 BLOCK_D)  # fmt: skip
    values = _rows(v, k_begin, col, k_length, v_stride, v_head, bias, 2, heads, HAS_BIAS,
                   HEAD_DIM, BLOCK_D)  # fmt: skip
    dkeys = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dvalues = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    start = 0
    if CAUSAL:  # the first query that sees the tile's first key
        start = tl.maximum(0, first - (k_length - q_length)) // BLOCK_M * BLOCK_M
    for begin in range(start, q_length, BLOCK_M):
        row = begin + tl.arange(0, BLOCK_M)
        queries = _rows(q, q_begin, row, q_length, q_stride, q_head, bias, 0, heads, HAS_BIAS,
                        HEAD_DIM, BLOCK_D)  # fmt: skip
        douts = _rows(dout, q_begin, row, q_length, dout_stride, dout_head, bias, 0, heads, False,
                      HEAD_DIM, BLOCK_D)  # fmt: skip
        log, center = _statistics(lse, delta, q_begin, row, q_length, total_q)
        scores = dot(queries, tl.trans(keys), None, PRECISION) * (scale * LOG2E)
        seen = _seen(row, col, q_length, k_length, CAUSAL)
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
    _store_rows(dk, dkeys * scale, k_begin, col, k_length, dk_stride, dk_head, HEAD_DIM, BLOCK_D)
    _store_rows(dv, dvalues, k_begin, col, k_length, dv_stride, dv_head, HEAD_DIM, BLOCK_D)


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


def settings(table, head_dim, dtype, device, longest):
    """BLOCK_D and the table's entry for it."""
    block_d, chip = max(32, triton.next_power_of_2(head_dim)), capability(device)
    fma = dtype == torch.float32 or chip < 80  # Triton has no tensor-core instruction for 7.5
    kind = "fma" if fma else chip if chip in table else "mma"
    if table is FORWARD and not fma and block_d <= 64:
        for short, entry in SHORT.items():
            if longest <= short:
                return block_d, *entry
    return block_d, *table[kind][block_d]


def _registers(warps):
    """All that 16 warps can have: left alone, ptxas stops at half of them, and spills."""
    return 128 if warps == 16 else None


def _strides(*tensors):
    return [stride for t in tensors for stride in (t.stride(0), t.stride(1))]


def _common(q, bias, causal, dropout_p):
    return {
        "CAUSAL": causal, "DROPOUT": dropout_p > 0, "HAS_BIAS": bias is not None,
        "HEAD_DIM": q.shape[2], "PRECISION": precision(), "enable_fp_fusion": True,
    }  # fmt: skip


def _search(q, longest, causal, bias, dropout_p, tiles):
    """What BERT_FAST_AUTOTUNE needs: what the fastest settings depend on (lengths by powers of
    two), and those it tries beside the table, for so many ``tiles`` of each block's rows."""
    block_d = max(32, triton.next_power_of_2(q.shape[2]))
    longest = triton.next_power_of_2(max(longest, 1))
    kind = q.dtype, q.shape[1:], longest, causal, bias is not None, dropout_p > 0
    blocks = [(128, 128), (128, 64), (64, 128), (64, 64), (64, 32), (32, 32)]
    fitting = [pair for pair in blocks if sum(pair) * block_d * tiles <= 32768] or [(32, 32)]
    return kind, [(*p, warps, stages) for p in fitting for warps in (4, 8) for stages in (1, 2, 3)]


@on_own_device("triton")
def attention_forward(
    q, k, v, cu_q, cu_k, max_q, max_k, bias, scale, causal, dropout_p, seed, out=None
):
    cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    total_q, heads, head_dim = q.shape
    out = q.new_empty(q.shape) if out is None else out
    lse = torch.empty(heads, total_q, dtype=torch.float32, device=q.device)
    batch = cu_q.numel() - 1
    block_d, *table = settings(FORWARD, head_dim, q.dtype, q.device, max_k)

    def launch(chosen):
        BLOCK_M, BLOCK_N, warps, stages = chosen
        _forward[(total_q // BLOCK_M + batch + 1, heads)](
            q, k, v, q if bias is None else bias.contiguous(), out, lse, cu_q, cu_k,
            seed_or(seed, cu_q), *_strides(q, k, v, out), batch, total_q, heads, scale,
            threshold(dropout_p), 1.0 / (1.0 - dropout_p), ONE_BLOCK=max_k <= BLOCK_N,
            BLOCK_D=block_d, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=warps, num_stages=stages,
            debug=True, sanitize_overflow=False, **_common(q, bias, causal, dropout_p),
        )  # fmt: skip

    if q.numel():
        search = functools.partial(_search, q, max_k, causal, bias, dropout_p, tiles=1)
        tuning.run("attention.forward", tuple(table), search, launch)
    return out, lse


@on_own_device("triton")
def attention_backward(
    dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, bias, scale, causal, dropout_p, seed,
    dq, dk, dv,
):  # fmt: skip
    cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    (total_q, heads, head_dim), total_k = q.shape, k.shape[0]
    batch = cu_q.numel() - 1
    block_d, *table = settings(BACKWARD, head_dim, q.dtype, q.device, max_k)
    delta = torch.empty_like(lse)
    common = _common(q, bias, causal, dropout_p) | {"BLOCK_D": block_d}
    search = functools.partial(_search, q, max_k, causal, bias, dropout_p, tiles=2)
    bias = q if bias is None else bias.contiguous()
    inputs = dout, q, k, v, bias, lse, delta
    numbers = heads, scale, threshold(dropout_p), 1.0 / (1.0 - dropout_p)
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

    if q.numel():
        block = 2048 // block_d
        _delta[(triton.cdiv(total_q, block), heads)](
            dout, out, delta, *_strides(dout, out), total_q, HEAD_DIM=head_dim, BLOCK_D=block_d,
            BLOCK=block, enable_fp_fusion=True,
        )  # fmt: skip
        tuning.run("attention.backward_q", tuple(table), search, launch_q)
    if k.numel():
        tuning.run("attention.backward_kv", tuple(table), search, launch_kv)
