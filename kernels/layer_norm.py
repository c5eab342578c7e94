"""LN(residual + dropout(x + linear_bias)) * weight + bias in one pass, and its gradient.

With s the sum that is normalised, xhat = (s - mean) rstd and g = dout * weight (Ba et al. 2016):

    ds = rstd (g - mean(g) - xhat mean(g xhat))
    dweight = sum over rows of dout xhat        dbias = sum over rows of dout
    dresidual = ds      dx = ds * keep / (1 - p)      dlinear_bias = sum over rows of dx

Backward needs s, mean and rstd, and keeps those (the statistics in float32 in any dtype; s is x
itself where nothing is added). The mask is drawn again. Sums over rows take two stages in a fixed
order: each program's rows, then the programs.
"""

import torch
import triton
import triton.language as tl

from bert_fast.devices import on_own_device
from bert_fast.kernels.common import (
    cdiv,
    dropout_numbers,
    keep_mask,
    power_of_2,
    processors,
    seed_or,
    summed,
)
from bert_fast.kernels.launch import kernel

# Bytes of a tile in backward and its programs a multiprocessor: of the reads under way, which are
# two tiles a program, an H100 wants some 16 KB a multiprocessor. Not measured.
BACKWARD_BYTES, PROGRAMS = 4096, 4
STREAM = tl.constexpr(0xFFFFFFFF)  # dropout's fourth counter word: no attention's sequence


@triton.jit
def normalised(s, weight, bias, mean, rstd, row, col, rows, width, eps, SAVE: tl.constexpr):
    """LN(s) * weight + bias of whole rows; with SAVE, stores their mean and rstd."""
    inside = (row < rows)[:, None] & (col < width)[None, :]
    s = tl.where(inside, s, 0.0)
    center = tl.sum(s, 1) / width
    deviation = tl.where(inside, s - center[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(deviation * deviation, 1) / width + eps)
    if SAVE:
        tl.store(mean + row, center, row < rows)
        tl.store(rstd + row, inverse, row < rows)
    gain = tl.load(weight + col, col < width, 0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + col, col < width, 0.0).to(tl.float32)[None, :]
    return deviation * inverse[:, None] * gain + shift


@triton.jit
def normalise(s, weight, bias, out, mean, rstd, row, col, rows, width, eps, SAVE: tl.constexpr):
    """Stores LN(s) * weight + bias of whole rows and, with SAVE, their mean and rstd."""
    y = normalised(s, weight, bias, mean, rstd, row, col, rows, width, eps, SAVE)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + col[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), inside)


@kernel(do_not_specialize=["rows", "cut"])
def _forward(
    x,  # (rows, width)
    residual,  # (rows, width)
    linear_bias,  # (width,)
    weight,  # (width,)
    bias,  # (width,)
    out,  # (rows, width)
    total,  # (rows, width): the sum that is normalised, for backward
    mean,  # (rows,) float32
    rstd,  # (rows,) float32
    seed,  # (1,) int64
    rows,
    width,
    eps,
    cut,
    keep_scale,
    HAS_RESIDUAL: tl.constexpr,
    HAS_LINEAR_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    SAVE_TOTAL: tl.constexpr,
    SAVE_STATISTICS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: blocks of ROWS rows, each whole in registers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + col[None, :]
    s = tl.load(x + at, inside, 0.0).to(tl.float32)
    if HAS_LINEAR_BIAS:
        s += tl.load(linear_bias + col, col < width, 0.0).to(tl.float32)[None, :]
    if DROPOUT:
        keep = keep_mask(tl.load(seed), cut, row, 0, STREAM, ROWS, BLOCK // 8)
        s = tl.where(keep, s * keep_scale, 0.0)
    if HAS_RESIDUAL:
        s += tl.load(residual + at, inside, 0.0).to(tl.float32)
    if SAVE_TOTAL:
        tl.store(total + at, s.to(total.dtype.element_ty), inside)
    normalise(s, weight, bias, out, mean, rstd, row, col, rows, width, eps, SAVE_STATISTICS)


@kernel(do_not_specialize=["rows", "cut"])
def _backward(
    dout,  # (rows, width)
    total,  # (rows, width)
    mean,  # (rows,) float32
    rstd,  # (rows,) float32
    weight,  # (width,)
    dresidual,  # (rows, width)
    dx,  # (rows, width), with dropout
    partials,  # (3, programs, width) float32: dweight, dbias, dlinear_bias
    seed,  # (1,) int64
    rows,
    width,
    cut,
    keep_scale,
    HAS_LINEAR_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: programs; each takes every programs-th block of rows."""
    col = tl.arange(0, BLOCK)
    programs, program = tl.num_programs(0), tl.program_id(0)
    gain = tl.load(weight + col, col < width, 0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    dlinear_bias = tl.zeros((BLOCK,), tl.float32)
    for begin in range(program * ROWS, rows, programs * ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + col[None, :]
        s = tl.load(total + at, inside, 0.0).to(tl.float32)
        dy = tl.load(dout + at, inside, 0.0).to(tl.float32)
        center = tl.load(mean + row, row < rows, 0.0)[:, None]
        inverse = tl.load(rstd + row, row < rows, 0.0)[:, None]
        # Outside of the rows rstd is 0, outside of the columns dout: neither adds to any sum.
        xhat = (s - center) * inverse
        g = dy * gain
        mean_g = tl.sum(g, 1)[:, None] / width
        mean_g_xhat = tl.sum(g * xhat, 1)[:, None] / width
        ds = g * inverse - mean_g * inverse - xhat * (mean_g_xhat * inverse)
        tl.store(dresidual + at, ds.to(dresidual.dtype.element_ty), inside)
        if DROPOUT:
            keep = keep_mask(tl.load(seed), cut, row, 0, STREAM, ROWS, BLOCK // 8)
            ds = tl.where(keep, ds * keep_scale, 0.0)
            tl.store(dx + at, ds.to(dx.dtype.element_ty), inside)
        dweight += tl.sum(dy * xhat, 0)
        dbias += tl.sum(dy, 0)
        if HAS_LINEAR_BIAS:
            dlinear_bias += tl.sum(ds, 0)
    at = partials + program * width + col
    tl.store(at, dweight, col < width)
    tl.store(at + programs * width, dbias, col < width)
    if HAS_LINEAR_BIAS:
        tl.store(at + 2 * programs * width, dlinear_bias, col < width)


def tile(width, elements):
    """Rows and columns of a program's tile, of about so many elements, and its warps. Not measured:
    what spills no register (`bert-fast inspect`)."""
    block = max(16, power_of_2(width))
    return max(1, min(16, elements // block)), block, min(16, max(4, block // 256))


@on_own_device("triton")
def layer_norm_forward(
    x, weight, bias, residual, linear_bias, eps, dropout_p, seed, out=None, training=True
):
    """Returns out, and for backward the normalised sum (None where it is x itself), mean, rstd."""
    width = x.shape[-1]
    rows = x.numel() // width
    out = torch.empty_like(x) if out is None else out
    is_x = residual is None and linear_bias is None and dropout_p == 0
    total = torch.empty_like(x) if training and not is_x else None
    mean, rstd = (
        torch.empty(rows, dtype=torch.float32, device=x.device) if training else None
        for _ in range(2)
    )
    ROWS, BLOCK, warps = tile(width, 8192 // x.element_size())
    if rows:
        _forward[(cdiv(rows, ROWS),)](
            x, x if residual is None else residual,
            x if linear_bias is None else linear_bias.contiguous(), weight.contiguous(),
            bias.contiguous(), out, x if total is None else total, x if mean is None else mean,
            x if rstd is None else rstd, seed_or(seed, x), rows, width, eps,
            *dropout_numbers(dropout_p), HAS_RESIDUAL=residual is not None,
            HAS_LINEAR_BIAS=linear_bias is not None, DROPOUT=dropout_p > 0,
            SAVE_TOTAL=total is not None, SAVE_STATISTICS=training, ROWS=ROWS, BLOCK=BLOCK,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out, total, mean, rstd


@on_own_device("triton")
def layer_norm_backward(
    dout, total, mean, rstd, weight, has_linear_bias, dropout_p, seed, partial=False
):
    """Returns dx (None without dropout: it is dresidual), dresidual, dweight, dbias, and
    dlinear_bias (None without a linear bias); with ``partial``, in place of these sums one tensor,
    (sums, programs, width), of the programs' own."""
    width = total.shape[-1]
    rows = total.numel() // width
    dresidual = torch.empty_like(total)
    dx = torch.empty_like(total) if dropout_p > 0 else None
    ROWS, BLOCK, warps = tile(width, BACKWARD_BYTES // total.element_size())
    # Their number is the order of the sums: it depends on the device alone, for programs without
    # rows would add zeros.
    programs = max(1, min(PROGRAMS * processors(total.device), cdiv(rows, ROWS)))
    sums = 3 if has_linear_bias else 2
    partials = total.new_empty(sums, programs, width, dtype=torch.float32)
    _backward[(programs,)](
        dout, total, mean, rstd, weight.contiguous(), dresidual, dresidual if dx is None else dx,
        partials, seed_or(seed, total), rows, width, *dropout_numbers(dropout_p),
        HAS_LINEAR_BIAS=has_linear_bias, DROPOUT=dropout_p > 0, ROWS=ROWS, BLOCK=BLOCK,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    if partial:
        return dx, dresidual, partials
    dweight, dbias, *rest = summed(partials)
    return dx, dresidual, dweight, dbias, rest[0] if rest else None
