"""What the attention kernels share: which rows a program has, how they are read, and which pairs of
them count."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
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
def load_rows(
    base, begin, row, length, stride, head_stride, bias, part, heads,
    HAS_BIAS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
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
def store_rows(base, x, begin, row, length, stride, head_stride, HEAD_DIM: tl.constexpr,
               BLOCK_D: tl.constexpr):  # fmt: skip
    head, d = tl.program_id(1), tl.arange(0, BLOCK_D)
    inside = (row < length)[:, None] & (d < HEAD_DIM)[None, :]
    first = base + begin.to(tl.int64) * stride + head.to(tl.int64) * head_stride
    at = first + row.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, x.to(base.dtype.element_ty), inside)


@triton.jit
def seen_pairs(row, col, q_length, k_length, CAUSAL: tl.constexpr):
    """Which (row, col) pairs count. Causal is aligned to the last query and the last key."""
    seen = (row < q_length)[:, None] & (col < k_length)[None, :]
    if CAUSAL:
        seen &= col[None, :] <= row[:, None] + (k_length - q_length)
    return seen


@triton.jit
def plus_table(scores, table, first, row, col, q_length, table_rows, table_cols):
    """Scores in base 2 plus the position bias, whose table_cols are whole blocks, so that no column
    need be masked and loads are wide; ``first``: the tile's first row."""
    table_cols = tl.multiple_of(table_cols, TABLE_BLOCK)
    at = table + (tl.program_id(1).to(tl.int64) * table_rows + first) * table_cols
    at += (row - first)[:, None] * table_cols + col[None, :]
    return scores + tl.load(at, (row < q_length)[:, None], 0.0).to(tl.float32) * LOG2E


@triton.jit
def statistics(lse, delta, begin, row, length, total_q):
    """lse in base 2 (+inf where a row saw no key, so that its weights are zero) and delta."""
    at = tl.program_id(1).to(tl.int64) * total_q + begin + row
    log = tl.load(lse + at, row < length, float("-inf")) * LOG2E
    log = tl.where(log == float("-inf"), float("inf"), log)
    return log, tl.load(delta + at, row < length, 0.0)
