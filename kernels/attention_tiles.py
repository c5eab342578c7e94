"""What the attention kernels share: which rows a program has, how they are read, and which pairs of
them count."""

import torch.nn.functional as F
import triton
import triton.language as tl

from bert_fast.kernels.common import dot, philox

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of finite numbers
TABLE_BLOCK = tl.constexpr(128)  # the most columns of any tile
# They differ in every batch: nothing recompiles for them.
COUNTS = ["batch", "total_q", "total_k", "cut", "table_rows", "table_cols"]


@triton.jit
def find(cu, batch, total, BLOCK: tl.constexpr):
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
def span(cu, sequence, batch):
    """First row and length of the sequence on the other side; none for the rows after the last."""
    begin = tl.load(cu + sequence)
    end = begin
    if sequence < batch:
        end = tl.load(cu + sequence + 1)
    return begin, end - begin


@triton.jit
def rows_from(base, begin, stride, head_stride):
    """The address of row ``begin`` of the program's head. 64 bits to the row: a sequence may have
    more than 2^31 elements. (A loop adds rows_on to it: a product of 64 bits a turn takes more.)"""
    head = tl.program_id(1).to(tl.int64)
    return base + begin.to(tl.int64) * stride + head * head_stride


@triton.jit
def rows_on(stride, ROWS: tl.constexpr):
    """How far it is to the row that is ROWS further."""
    return tl.cast(stride, tl.int64) * ROWS


@triton.jit
def load_rows(at, left, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
              MASKED: tl.constexpr, MIXED: tl.constexpr = False):  # fmt: skip
    """ROWS rows from address ``at`` on, (ROWS, BLOCK_D). MASKED: zeros after the ``left`` rows that
    are the sequence's; else all are. MIXED: in key_order."""
    row, d = key_order(ROWS, MIXED), tl.arange(0, BLOCK_D)
    at += row.to(tl.int64)[:, None] * stride + d[None, :]
    inside = (row < left)[:, None]
    if HEAD_DIM < BLOCK_D:
        columns = (d < HEAD_DIM)[None, :]
        inside = inside & columns if MASKED else columns
    return tl.load(at, inside, 0.0) if MASKED or HEAD_DIM < BLOCK_D else tl.load(at)


@triton.jit
def load_queries(at, left, stride, bias, heads, HAS_BIAS: tl.constexpr, HEAD_DIM: tl.constexpr,
                 BLOCK_D: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """load_rows of q, with its bias."""
    x = load_rows(at, left, stride, HEAD_DIM, BLOCK_D, ROWS, MASKED)
    if HAS_BIAS:
        shift = load_bias(bias, 0, heads, HEAD_DIM, BLOCK_D)
        # In whole tiles, too: without the mask the sum is made in the layout of the product's
        # operand, of which warps have copies, and takes their registers.
        inside = (tl.arange(0, ROWS) < left)[:, None]
        x = tl.where(inside, x.to(tl.float32) + shift[None, :], 0.0).to(x.dtype)
    return x


@triton.jit
def load_bias(bias, part, heads, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The head's bias of q (``part`` 0), k (1) or v (2), (BLOCK_D,) float32."""
    d = tl.arange(0, BLOCK_D)
    at = bias + (part * heads + tl.program_id(1)) * HEAD_DIM + d
    return tl.load(at, d < HEAD_DIM, 0.0).to(tl.float32)


@triton.jit
def store_rows(at, x, left, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
               ROWS: tl.constexpr, MIXED: tl.constexpr = False):  # fmt: skip
    """What load_rows loads, MASKED."""
    row, d = key_order(ROWS, MIXED), tl.arange(0, BLOCK_D)
    inside = (row < left)[:, None] & (d < HEAD_DIM)[None, :]
    places = at + (row.to(tl.int64)[:, None] * stride + d[None, :])
    tl.store(places, x.to(at.dtype.element_ty), inside)


@triton.jit
def keys_seen(first, q_length, k_length, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):  # fmt: skip
    """How many keys the tile of queries from ``first`` sees, and how many of them, in whole blocks,
    all its queries see: those need no mask. Causal is aligned to the last query and key."""
    last, whole = k_length, k_length
    if CAUSAL:
        last = tl.minimum(last, first + BLOCK_M + k_length - q_length)
        whole = tl.maximum(0, tl.minimum(whole, first + 1 + k_length - q_length))
    return last, whole // BLOCK_N * BLOCK_N


@triton.jit
def seen_pairs(first, begin, q_length, k_length, CAUSAL: tl.constexpr, ROWS: tl.constexpr,
               COLS: tl.constexpr, MIXED: tl.constexpr):  # fmt: skip
    """Which pairs count of the queries from ``first`` and the keys from ``begin``; MIXED: these in
    key_order. Queries past the last are not asked about: nothing of theirs is stored, and their
    weights are 0 in backward (statistics)."""
    row, col = first + tl.arange(0, ROWS), begin + key_order(COLS, MIXED)
    seen = (col < k_length)[None, :]
    if CAUSAL:
        seen = seen & (col[None, :] <= row[:, None] + (k_length - q_length))
    return seen


@triton.jit
def score_factor(scale):
    """What products of queries and keys are multiplied by to be scores in base 2. Not quite 0: what
    is to come to -inf is -inf before, and a position bias is divided by it."""
    return tl.where(tl.abs(scale) < 1e-30, 1e-30, scale) * LOG2E


def table_or(table, other):
    """The position bias in whole blocks of columns, and its rows and columns; without one a pointer
    must be given all the same."""
    if table is None:
        return other, 0, 0
    if missing := -table.shape[2] % TABLE_BLOCK.value:
        table = F.pad(table, (0, missing))
    return table.contiguous(), *table.shape[1:]


@triton.jit
def table_from(table, first, begin, table_rows, table_cols):
    """The address of query ``first`` and key ``begin`` in the position bias of the program's head.
    Columns are whole blocks, so that none need be masked and loads are wide."""
    table_cols = tl.multiple_of(table_cols, TABLE_BLOCK)
    return table + (tl.program_id(1).to(tl.int64) * table_rows + first) * table_cols + begin


@triton.jit
def table_tile(at, left, table_cols, factor, ROWS: tl.constexpr, COLS: tl.constexpr,
               MIXED: tl.constexpr):  # fmt: skip
    """The position bias of the tile from ``at`` on, of ``left`` queries, keys in key_order where
    MIXED, over factor / log2(e): what their product is added to, so that the tile comes into the
    product's layout, not all that follows into the load's."""
    table_cols = tl.multiple_of(table_cols, TABLE_BLOCK)
    row = tl.arange(0, ROWS)
    at += row[:, None] * table_cols + key_order(COLS, MIXED)[None, :]
    tile = tl.load(at, (row < left)[:, None], 0.0)
    return tile.to(tl.float32) * (LOG2E / factor)


@triton.jit
def row_shift(queries, bias, heads, factor, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """What k's bias adds to all scores of a row, in base 2. It cancels in the softmax, so it is
    part of lse alone."""
    shift = load_bias(bias, 1, heads, HEAD_DIM, BLOCK_D)
    return tl.sum(queries.to(tl.float32) * shift[None, :], 1) * factor


@triton.jit
def statistics(at, left, total_q, heads, NEEDS_EXTRA: tl.constexpr, MASKED: tl.constexpr,
               ROWS: tl.constexpr):  # fmt: skip
    """What backward_q found of the ROWS rows from ``at`` on: log, center and extra, as
    score_gradients takes them. MASKED: log +inf after the ``left`` rows that are the sequence's, so
    that their weights are zero; else all are."""
    row = tl.arange(0, ROWS)
    at += row
    inside, part = row < left, total_q.to(tl.int64) * heads
    if MASKED:
        log = tl.load(at, inside, float("inf"))
        center = tl.load(at + part, inside, 0.0)
        extra = tl.load(at + 2 * part, inside, 0.0) if NEEDS_EXTRA else center
    else:
        log, center = tl.load(at), tl.load(at + part)
        extra = tl.load(at + 2 * part) if NEEDS_EXTRA else center
    return log, center, extra


@triton.jit
def find_statistics(
    queries, douts, out, lse, work, bias, begin, first, length, out_stride, out_head, total_q,
    heads, factor, DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """statistics from the beginning, and, STORED, for the kernels after.

    log: lse in base 2, less what k's bias adds to all scores of a row; +inf where a row saw no key.
    v's bias adds to all of a row's dweights the same, extra = dO bias_v: without dropout that is
    part of center, which is otherwise delta = rowsum(dO * O).
    """
    outs = load_rows(rows_from(out, begin + first, out_stride, out_head), length - first,
                     out_stride, HEAD_DIM, BLOCK_D, ROWS, True)  # fmt: skip
    x = douts.to(tl.float32)
    center = tl.sum(x * outs.to(tl.float32), 1)
    row = tl.arange(0, ROWS)
    at = tl.program_id(1).to(tl.int64) * total_q + begin + first + row
    inside, part = row < length - first, total_q.to(tl.int64) * heads
    log = tl.load(lse + at, inside, float("-inf")) * LOG2E
    log = tl.where(log == float("-inf"), float("inf"), log)
    extra = center
    if HAS_BIAS:
        log -= row_shift(queries, bias, heads, factor, HEAD_DIM, BLOCK_D)
        extra = tl.sum(x * load_bias(bias, 2, heads, HEAD_DIM, BLOCK_D)[None, :], 1)
        if not DROPOUT:
            center -= extra
    if STORED:
        tl.store(work + at, log, inside)
        tl.store(work + at + part, center, inside)
        if HAS_BIAS and DROPOUT:
            tl.store(work + at + 2 * part, extra, inside)
    return log, center, extra


@triton.jit
def score_gradients(
    queries, keys, values, douts, log, center, extra, table_at, seed, first, begin, q_length,
    k_length, table_cols, factor, cut, keep_scale, sequence,
    MASKED: tl.constexpr,  # as in attend
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """P * Z and dS (attention.py) of the queries from ``first`` and the keys from ``begin``."""
    if queries.dtype == tl.float32:
        # Without tensor cores: the barrier that the tiles loaded in this iteration need, before
        # those that stay are read. Later, all of these would wait for it in registers.
        tl.debug_barrier()
    start = None
    if HAS_TABLE:
        start = table_tile(table_at, q_length - first, table_cols, factor, BLOCK_M, BLOCK_N,
                           DROPOUT)  # fmt: skip
    scores = dot(queries, tl.trans(keys), start, PRECISION) * factor
    weights = tl.exp2(scores - log[:, None])
    if MASKED:
        seen = seen_pairs(first, begin, q_length, k_length, CAUSAL, BLOCK_M, BLOCK_N, DROPOUT)
        weights = tl.where(seen, weights, 0.0)
    dweights = dot(douts, tl.trans(values), None, PRECISION)
    dropped = weights
    if DROPOUT:
        if HAS_BIAS:
            dweights += extra[:, None]
        kept = drawn(seed, cut, first, begin, sequence, BLOCK_M, BLOCK_N)
        z = tl.where(kept, keep_scale, 0.0)
        dropped = weights * z
        dweights = dweights * z
    return dropped, weights * (dweights - center[:, None])


@triton.jit
def key_order(COLS: tl.constexpr, DROPOUT: tl.constexpr):
    """The order of a tile's keys, (COLS,). Dropout draws for eight keys at once, four neighbours
    and those 16 further, and a thread of the tensor cores has of 32 columns 2 i, 2 i + 1, and those
    8, 16 and 24 further: they are given to these keys, so that no thread draws what another draws,
    and none waits for it. Softmax does not mind the order."""
    c = tl.arange(0, COLS)
    if DROPOUT:
        c = (c & -15) | (c & 6) << 1 | (c & 8) >> 2
    return c


@triton.jit
def drawn(seed, cut, first, begin, sequence, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which pairs dropout keeps of the queries from ``first`` and the keys from ``begin``, (ROWS,
    COLS), the keys in key_order."""
    WIDTH: tl.constexpr = COLS if COLS > 32 else 32  # of fewer keys one half of a draw's is used
    draw = begin // 32 * 4 + tl.arange(0, WIDTH // 8)
    words = philox(tl.load(seed), first + tl.arange(0, ROWS), draw, tl.program_id(1), sequence,
                   ROWS, WIDTH // 8)  # fmt: skip
    bits = tl.zeros((ROWS, WIDTH // 8), tl.uint32)
    for i in tl.static_range(4):  # compilers see the comparisons, not the bits
        bits |= (words[i] << 16 >= cut.to(tl.uint32)).to(tl.uint32) << i
        bits |= (words[i] >= cut.to(tl.uint32)).to(tl.uint32) << 4 + i
    if COLS < 32:
        bits = bits >> (begin // COLS % 2 * 4)
    HALVES: tl.constexpr = 1 if COLS < 32 else 2
    # (blocks, halves, twos, draws, 2): as the tensor cores have a tile's columns.
    half, two = tl.arange(0, HALVES), tl.arange(0, 2)
    at = 4 * half[:, None, None, None] + 2 * two[None, :, None, None] + two[None, None, None, :]
    bits = (
        bits.reshape(ROWS, WIDTH // 32, 4)[:, :, None, None, :, None] >> at[None, None, :, :, :, :]
    )
    return (bits & 1).reshape(ROWS, COLS) != 0


@triton.jit
def partial_sums(x, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr):
    """The sums of each row's columns that are PARTS apart, (ROWS, PARTS)."""
    return tl.sum(tl.reshape(x, (ROWS, COLS // PARTS, PARTS)), 1)


@triton.jit
def attend(
    queries, top, norm, left, total, keys_at, values_at, table_at, seed, first, begin, q_length,
    k_length, k_stride, v_stride, table_cols, factor, cut, sequence,
    MASKED: tl.constexpr,  # some of the keys are past the last, or hidden from some queries
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys, from ``begin``: the new top, norm, left (the sum of the weights that
    dropout keeps) and total of a tile of queries from ``first``. norm and left are partial_sums:
    a row's threads add their own, and to each other's once, when all keys are through."""
    keys = load_rows(keys_at, k_length - begin, k_stride, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED,
                     DROPOUT)  # fmt: skip
    start = None
    if HAS_TABLE:
        start = table_tile(table_at, q_length - first, table_cols, factor, BLOCK_M, BLOCK_N,
                           DROPOUT)  # fmt: skip
    scores = dot(queries, tl.trans(keys), start, PRECISION)
    if MASKED:
        seen = seen_pairs(first, begin, q_length, k_length, CAUSAL, BLOCK_M, BLOCK_N,
                          DROPOUT)  # fmt: skip
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.max(scores, 1) * factor
    # Finite, from LOWEST on: a row that has seen no finite score has weights of zero.
    if ONE_BLOCK:
        new_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    else:
        new_top = tl.maximum(top, new_top)
    weights = tl.exp2(scores * factor - new_top[:, None])
    if ONE_BLOCK:
        norm = partial_sums(weights, BLOCK_M, BLOCK_N, PARTS)
    else:
        shrink = tl.exp2(top - new_top)[:, None]
        norm = norm * shrink + partial_sums(weights, BLOCK_M, BLOCK_N, PARTS)
        total *= shrink
    if DROPOUT:
        weights *= drawn(seed, cut, first, begin, sequence, BLOCK_M, BLOCK_N).to(tl.float32)
        if HAS_BIAS:
            if not ONE_BLOCK:
                left *= shrink
            left += partial_sums(weights, BLOCK_M, BLOCK_N, PARTS)
    values = load_rows(values_at, k_length - begin, v_stride, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED,
                       DROPOUT)  # fmt: skip
    if ONE_BLOCK:
        total = dot(weights.to(values.dtype), values, None, PRECISION)
    else:
        total = dot(weights.to(values.dtype), values, total, PRECISION)
    return new_top, norm, left, total
