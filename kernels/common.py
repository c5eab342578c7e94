"""What the kernels share: dropout's random numbers, sums in a fixed order, launch settings."""

import functools
import itertools
import os

import torch
import triton
import triton.language as tl

from bert_fast.devices import memory_of_sums, on_own_device
from bert_fast.kernels.launch import kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, for tests

MULTIPLIER_0, MULTIPLIER_1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
WEYL_0, WEYL_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
INTERPRETING = tl.constexpr(INTERPRETED)

SUM_ROWS, SUM_BLOCK = 256, 16  # of a program's tile, where partial sums are added


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b, summed in float32."""
    if INTERPRETING:  # it multiplies bfloat16 as if it were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def philox(seed, rows, groups, c2, c3, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Philox4x32-7 (Salmon et al. 2011) by position, as in bert_fast/ops/reference.py: a counter
    (group, row, c2, c3) gives four words, each (ROWS, GROUPS) uint32, two halves each.

    rows: (ROWS,) row numbers; groups: (GROUPS,) numbers of a row's draws.
    """
    zero = tl.zeros((ROWS, GROUPS), tl.uint32)
    w0 = zero + groups.to(tl.uint32)[None, :]
    w1 = zero + rows.to(tl.uint32)[:, None]
    w2 = (zero + c2).to(tl.uint32)
    w3 = (zero + c3).to(tl.uint32)
    key0, key1 = zero + seed.to(tl.uint32), zero + (seed >> 32).to(tl.uint32)
    by0, by1 = zero + MULTIPLIER_0, zero + MULTIPLIER_1
    for _ in tl.static_range(7):  # one wide multiplication gives both halves of a product
        p0, p1 = w0.to(tl.uint64) * by0, w2.to(tl.uint64) * by1
        w0 = (p1 >> 32).to(tl.uint32) ^ w1 ^ key0
        w2 = (p0 >> 32).to(tl.uint32) ^ w3 ^ key1
        w1, w3 = p1.to(tl.uint32), p0.to(tl.uint32)
        key0 += WEYL_0
        key1 += WEYL_1
    return w0, w1, w2, w3


@triton.jit
def keep_mask(seed, cut, rows, c2, c3, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Which elements dropout keeps, (ROWS, 8 * GROUPS): those whose half is not below the ``cut``.

    rows: (ROWS,) row numbers.
    """
    w0, w1, w2, w3 = philox(seed, rows, tl.arange(0, GROUPS), c2, c3, ROWS, GROUPS)
    # join puts a new last dimension: [.., i, j] is word 2 i + j.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(ROWS, 4 * GROUPS)
    return tl.join(words << 16, words).reshape(ROWS, 8 * GROUPS) >= cut.to(tl.uint32)


@triton.jit
def _sum(partials, count, width, col, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK,): the sums of these columns of (count, width) numbers, always in the same order."""
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, count, ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (col < width)[None, :]
        total += tl.load(partials + row.to(tl.int64)[:, None] * width + col[None, :], inside, 0.0)
    if ROWS >= 32:
        # A thread's rows, a warp's, all: as a GPU adds them, and the interpreter, which would add
        # all rows one after another, errs no more than it.
        total = tl.sum(tl.sum(total.reshape(4, ROWS // 32, 8, BLOCK), 0), 1)
    return tl.sum(total, 0)


@kernel(do_not_specialize=["count"])
def sum_partials(
    partials,  # (sums, count, width) float32
    out0, out1, out2,  # (width,), one a sum
    count, width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[c] = sum over count of partials[count, c] for up to three sums of a kind. Grid: (blocks
    of columns, sums)."""
    number = tl.program_id(1)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = _sum(partials + number.to(tl.int64) * count * width, count, width, col, ROWS, BLOCK)
    if number == 0:
        tl.store(out0 + col, found, col < width)
    elif number == 1:
        tl.store(out1 + col, found, col < width)
    else:
        tl.store(out2 + col, found, col < width)


def summed(partials, out=None):
    """The column sums of a (count, width) float32 tensor, or those of each part of a (sums, count,
    width) one, as a list of up to three: by one kernel, in a fixed order."""
    *sums, count, width = partials.shape
    if out is None:
        outs = [partials.new_empty(width) for _ in range(sums[0] if sums else 1)]
    else:
        outs = [out]
    if width:
        # Narrow sums have few programs: many rows at once, or these would wait for each in turn.
        ROWS, BLOCK, warps = (SUM_ROWS, SUM_BLOCK, 8) if width <= 65536 else (4, 512, 4)
        sum_partials[(cdiv(width, BLOCK), len(outs))](
            partials, outs[0], outs[min(1, len(outs) - 1)], outs[-1], count, width, ROWS=ROWS,
            BLOCK=BLOCK, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return outs if sums else outs[0]


@kernel(do_not_specialize=["rows"])
def partial_sums(x, partials, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """partials[p] = sum of the rows of x, (rows, width), that are program p's. Grid: (blocks of
    columns, programs); each program takes every programs-th block of rows."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + col[None, :]
        total += tl.sum(tl.load(x + at, inside, 0.0).to(tl.float32), 0)
    tl.store(partials + tl.program_id(1) * width + col, total, col < width)


@kernel(do_not_specialize=["count0", "count1", "count2", "count3", "end0", "end1", "end2"])
def sum_kinds(
    kind0, kind1, kind2, kind3,  # partial sums, each (sums, count, width) float32
    out,  # all sums, one after another, each in whole blocks of columns
    count0, count1, count2, count3,
    width0, width1, width2, width3,
    end0, end1, end2,  # the number of a kind's last block of columns, plus one
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """:func:`sum_partials` of four kinds. Grid: blocks of columns of all sums."""
    block = tl.program_id(0)
    kind, count, width, begin = kind3, count3, width3, end2
    if block < end2:
        kind, count, width, begin = kind2, count2, width2, end1
    if block < end1:
        kind, count, width, begin = kind1, count1, width1, end0
    if block < end0:
        kind, count, width, begin = kind0, count0, width0, end0 * 0
    columns, place = tl.cdiv(width, BLOCK), tl.arange(0, BLOCK)
    number = (block - begin) // columns
    col = (block - begin) % columns * BLOCK + place
    found = _sum(kind + number.to(tl.int64) * count * width, count, width, col, ROWS, BLOCK)
    tl.store(out + block * BLOCK + place, found, col < width)


@on_own_device("triton")
def sums_of(*kinds, dtype=torch.float32):
    """The sums of up to four (sums, count, width) float32 tensors over ``count``, by one kernel in
    a fixed order: a list of (width,) tensors of ``dtype`` for each, which share their memory."""
    out, found = memory_of_sums(kinds, SUM_BLOCK, dtype)
    blocks, *numbers = _numbers_of(*[kind.shape for kind in kinds])
    sum_kinds[(blocks,)](
        *kinds, *kinds[:1] * (4 - len(kinds)), out, *numbers, ROWS=SUM_ROWS, BLOCK=SUM_BLOCK,
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return found


@functools.lru_cache(256)
def _numbers_of(*shapes):
    """Of these kinds: how many blocks there are, and the numbers that sum_kinds is given."""
    ends = itertools.accumulate(sums * cdiv(width, SUM_BLOCK) for sums, _, width in shapes)
    ends, given = list(ends), shapes + shapes[:1] * (4 - len(shapes))
    _, counts, widths = zip(*given, strict=True)
    return ends[-1], *counts, *widths, *(ends + ends[-1:] * 3)[:3]


@on_own_device("triton")
def column_partials(x):
    """(1, programs, width) float32: what programs sum over their rows of a contiguous (rows, width)
    tensor."""
    rows, width = x.shape
    ROWS, BLOCK, columns, programs = summing_grid(x, 8192, 4)
    partials = x.new_empty(1, programs, width, dtype=torch.float32)
    partial_sums[(columns, programs)](
        x, partials, rows, width, ROWS=ROWS, BLOCK=BLOCK, enable_fp_fusion=True
    )
    return partials


def tile_of_columns(x, num_bytes):
    """Rows and columns of a tile of about so many bytes, for four warps: each thread has the same
    columns of all its rows, so that a bias is read once and sums of columns need no exchange."""
    block = 2048 // x.element_size()
    BLOCK = max(16, min(block, power_of_2(x.shape[-1])))
    return max(1, min(32, num_bytes // (BLOCK * x.element_size()))), BLOCK


def summing_grid(x, num_bytes, programs):
    """Rows and columns of a tile of about so many bytes, and the grid, of about so many programs a
    multiprocessor, where each sums its rows. The order of the sums depends on the device and the
    width alone, for programs without rows would add zeros."""
    width = x.shape[-1]
    ROWS, BLOCK = tile_of_columns(x, num_bytes)
    columns = cdiv(width, BLOCK)
    programs = cdiv(programs * processors(x.device), columns)
    return ROWS, BLOCK, columns, max(1, min(programs, cdiv(x.numel() // width, ROWS)))


def cdiv(a, b):
    """a / b rounded up. Triton's own may be called in kernels, too, for which it takes 2 us."""
    return -(-a // b)


def power_of_2(n):
    """The least that is not below n, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def processors(device):
    """Streaming multiprocessors of the device; a few where there is none (the interpreter)."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


compiling_for = 80  # for bert-fast inspect and the interpreter, which have no device


@functools.cache
def _capability(device):
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def capability(device):
    """The chip's compute capability as one number, 90 for 9.0."""
    return compiling_for if device.index is None else _capability(device)


def precision():
    """float32 in true float32, unless torch may use TF32. ``fp32_precision`` (torch 2.9) shows what
    was said by any of torch's ways; ``allow_tf32`` raises after the newer ones."""
    matmul = torch.backends.cuda.matmul
    asked = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if asked is None else asked == "tf32"
    return "tf32" if allowed and not INTERPRETED else "ieee"


def dropout_numbers(dropout_p):
    """The reference's cut, which halves of words are compared with, in a word's upper half; and the
    factor of what is kept."""
    if dropout_p == 0:
        return 0, 1.0
    cut = min(max(int(dropout_p * 65536 + 0.5), 1), 65535)
    return cut << 16, 65536 / (65536 - cut)


def seed_or(seed, other):
    """The seed's tensor; kernels without dropout read nothing, but a pointer must be given."""
    return other if seed is None else seed
