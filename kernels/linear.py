"""GELU(x W^T + bias) as one kernel: the first half of BERT's feed-forward.

The bias is added, and GELU applied, to the product while it is still in registers; training stores
the product, too, in the same pass. Backward is GELU's kernel and PyTorch's products: in one kernel
each tile of dx computed GELU's gradients anew, and on an H100 the backward of a whole layer of
BERT-base took 3.5 times as long.

**Schedule.** Persistent: each program takes every programs-th tile, in groups of GROUP rows of them
so that the operands stay in L2. On chips that have it (9.0 and later) tiles of 16-bit matrices are
loaded and stored by the tensor memory accelerator (TMA), through descriptors.
"""

import functools

import torch
import triton
import triton.language as tl

from bert_fast.devices import on_own_device
from bert_fast.kernels import tuning
from bert_fast.kernels.common import (
    INTERPRETED,
    capability,
    cdiv,
    dot,
    power_of_2,
    precision,
    processors,
)
from bert_fast.kernels.gelu import gelu
from bert_fast.kernels.launch import kernel

GROUP = tl.constexpr(8)


@triton.jit
def _tile_of(number, row_tiles, col_tiles):
    """Row and column of a tile: down GROUP rows of tiles, then to the next column."""
    per_group = GROUP * col_tiles
    first = number // per_group * GROUP
    rows = tl.minimum(row_tiles - first, GROUP)
    return first + number % per_group % rows, number % per_group // rows


@triton.jit
def _load(a, row, col, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """The tile of a (rows, cols) matrix, or of its descriptor, from (row, col); zeros outside."""
    if TMA:
        x = a.load([row, col])
    else:
        r, c = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
        at = r.to(tl.int64)[:, None] * cols + c[None, :]
        x = tl.load(a + at, (r < rows)[:, None] & (c < cols)[None, :], 0.0)
    return x


@triton.jit
def _store(a, x, row, col, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        a.store([row, col], x.to(a.dtype))
    else:
        r, c = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
        at = r.to(tl.int64)[:, None] * cols + c[None, :]
        inside = (r < rows)[:, None] & (c < cols)[None, :]
        tl.store(a + at, x.to(a.dtype.element_ty), inside)


@kernel(do_not_specialize=["rows"])
def _forward(
    x,  # (rows, width)
    weight,  # (out_width, width)
    bias,  # (out_width,)
    out,  # (rows, out_width)
    product,  # (rows, out_width): x W^T, for backward
    rows, width, out_width,
    HAS_BIAS: tl.constexpr,
    TANH: tl.constexpr,
    SAVE_PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,  # the matrices are descriptors
):  # fmt: skip
    """Grid: programs."""
    row_tiles, col_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(out_width, BLOCK_N)
    for number in range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0)):
        row_tile, col_tile = _tile_of(number, row_tiles, col_tiles)
        row, col = row_tile * BLOCK_M, col_tile * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, width, BLOCK_K):
            a = _load(x, row, k, rows, width, BLOCK_M, BLOCK_K, TMA)
            b = _load(weight, col, k, out_width, width, BLOCK_N, BLOCK_K, TMA)
            total = dot(a, tl.trans(b), total, PRECISION)
        # By halves of the columns: the whole tile's erf at once would fill the registers.
        HALF: tl.constexpr = BLOCK_N // 2
        halves = total.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        for i in tl.static_range(2):
            u, at = halves[i], col + i * HALF
            if SAVE_PRODUCT:
                _store(product, u, row, at, rows, out_width, BLOCK_M, HALF, TMA)
            if HAS_BIAS:
                c = at + tl.arange(0, HALF)
                u += tl.load(bias + c, c < out_width, 0.0).to(tl.float32)[None, :]
            _store(out, gelu(u, TANH, tl.float32), row, at, rows, out_width, BLOCK_M, HALF, TMA)


# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages: by plain FMA or chip, the others sharing mma.sync; apart
# from them 16-bit rows that are no multiple of 16 bytes, loaded element by element. What spills no
# register (`bert-fast inspect`); no time has been measured yet.
FORWARD = {
    "fma": (64, 64, 16, 8, 2), "odd": (64, 64, 32, 8, 2), "mma": (128, 128, 32, 8, 3),
    90: (128, 128, 64, 8, 4), 100: (128, 128, 64, 8, 3),
}  # fmt: skip


def _settings(x, weight):
    kind = chip = capability(x.device)
    if x.dtype == torch.float32 or chip < 80:
        kind = "fma"
    elif weight.shape[0] % 8 or weight.shape[1] % 8:
        kind = "odd"
    return FORWARD[kind if kind in FORWARD else "mma"]


def _can_use_tma(tensors, chip):
    """Whether descriptors can name the matrices: 16-byte rows, and a chip that has them."""
    return (chip >= 90 or INTERPRETED) and all(
        t.itemsize == 2 and t.shape[1] * t.itemsize % 16 == 0 and _aligned(t) for t in tensors
    )


def _aligned(tensor):
    return tensor.device.type == "meta" or tensor.data_ptr() % 16 == 0


def _described(tma, *blocks):
    """(tensor, rows and columns of its tile) pairs as descriptors, or as they are."""
    if not tma:
        return [tensor for tensor, *_ in blocks]
    from triton.tools.tensor_descriptor import TensorDescriptor

    return [TensorDescriptor.from_tensor(tensor, list(block)) for tensor, *block in blocks]


def _search(x, weight, bias, *flags):
    """What BERT_FAST_AUTOTUNE needs: what the fastest settings depend on (rows by powers of two),
    and those it tries beside the table."""
    kind = x.dtype, power_of_2(len(x)), *weight.shape, bias is not None, *flags
    blocks = [(128, 256, 8), (128, 128, 8), (128, 128, 4), (64, 128, 4), (64, 64, 4)]
    return kind, [
        (M, N, K, warps, stages) for M, N, warps in blocks for K in (32, 64) for stages in (2, 3, 4)
    ]


@on_own_device("triton")
def linear_gelu_forward(x, weight, bias, approximate, save):
    """GELU(x W^T + bias) and, with ``save``, x W^T (else None). x: (rows, width), contiguous like
    weight, (out_width, width)."""
    (rows, width), out_width = x.shape, weight.shape[0]
    out = x.new_empty(rows, out_width)
    product = torch.empty_like(out) if save else None
    tma = _can_use_tma((x, weight, out), capability(x.device))

    def launch(chosen):
        M, N, K, warps, stages = chosen
        tiles = cdiv(rows, M) * cdiv(out_width, N)
        a, b, y, z = _described(
            tma, (x, M, K), (weight, N, K), (out, M, N // 2),
            (out if product is None else product, M, N // 2),
        )  # fmt: skip
        _forward[(min(tiles, processors(x.device)),)](
            a, b, x if bias is None else bias.contiguous(), y, z, rows, width, out_width,
            HAS_BIAS=bias is not None, TANH=approximate == "tanh", SAVE_PRODUCT=save, BLOCK_M=M,
            BLOCK_N=N, BLOCK_K=K, PRECISION=precision(), TMA=tma, num_warps=warps,
            num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip

    if rows:
        search = functools.partial(_search, x, weight, bias, save)
        tuning.run("linear_gelu.forward", _settings(x, weight), search, launch)
    return out, product
