"""GELU(x + bias), exact by erf or by tanh (Hendrycks & Gimpel 2016), and its gradient.

With u = x + bias, Phi the normal distribution and phi its density:

    exact   y = u Phi(u)           dy/du = Phi(u) + u phi(u)
    tanh    y = u (1 + t) / 2      dy/du = (1 + t) / 2 + u (1 - t^2) / 2 dv/du
            t = tanh v, v = sqrt(2 / pi) (u + 0.044715 u^3)

dbias is dx summed over rows: each program sums its rows' columns in float32, and a second kernel
adds the programs in order.
"""

import torch
import triton
import triton.language as tl

from bert_fast.devices import on_own_device
from bert_fast.kernels.common import cdiv, summed, summing_grid, tile_of_columns
from bert_fast.kernels.launch import kernel

ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
ROOT_2_PI = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)

# Results of 16 bits: with v = |u| both the tail Phi(-v) and GELU'(-v) / (ROOT - v), where ROOT is
# the gradient's own root, are 2 to the power of a smooth function, here a polynomial in v made by
# minimax. Its error, relative to the result, stays below half a rounding of the type it is for, up
# to LARGEST, from where on the results round to 0 (and 1). The power is kept 2^24 above, so that
# bfloat16's smallest numbers are not flushed with it.
ROOT, ABOVE = tl.constexpr(0.7517915246935646), tl.constexpr(2.0**-24)
LARGEST_BF16, LARGEST_FP16 = tl.constexpr(14.5), tl.constexpr(6.5)
TAIL_BF16 = tl.constexpr((22.999561, -1.146008, -0.46867555, -0.046510149, 0.0059254551,
                          -0.00047065184, 2.0638754e-05, -3.7864913e-07))  # fmt: skip
TAIL_FP16 = tl.constexpr((23.000004, -1.1512511, -0.45846438, -0.053960066, 0.0085078888,
                          -0.00093052437, 6.1598235e-05, -1.8348086e-06))  # fmt: skip
SLOPE_BF16 = tl.constexpr((23.410786, -0.37213421, -0.58560717, -0.03289723, 0.0049505509,
                           -0.00043670984, 2.0519818e-05, -3.9482524e-07))  # fmt: skip
SLOPE_FP16 = tl.constexpr((23.411554, -0.38224807, -0.56420118, -0.049853861, 0.011388059,
                           -0.001708372, 0.0001476093, -5.5034557e-06))  # fmt: skip


# Bytes of a program's tile, and programs a multiprocessor: enough reads under way to fill the
# memory system (an H100's wants some 16 KB a multiprocessor). Not measured.
FORWARD_BYTES, BACKWARD_BYTES, PROGRAMS = 16384, 8192, 4


@triton.jit
def power(v, BY: tl.constexpr):
    """2 to the power of the polynomial with coefficients BY."""
    exponent = v * BY[7] + BY[6]
    for i in tl.static_range(6):
        exponent = exponent * v + BY[5 - i]
    return tl.exp2(exponent)


@triton.jit
def tanh_parts(u):
    """(1 + t) / 2 and (1 - t^2) / 4, from exp(-2 |v|): nothing cancels or overflows."""
    v = (u + u * u * u * CUBIC) * ROOT_2_PI
    e = tl.exp(-2.0 * tl.abs(v))
    inverse = 1.0 / (1.0 + e)
    return tl.where(v > 0, inverse, e * inverse), e * inverse * inverse


@triton.jit
def gelu(u, TANH: tl.constexpr, dtype: tl.constexpr):
    """Of a float32 u, for a result that is rounded to dtype."""
    if TANH:
        share, _ = tanh_parts(u)
        y = u * share
    elif dtype == tl.bfloat16:
        v = tl.minimum(tl.abs(u), LARGEST_BF16, tl.PropagateNan.ALL)
        y = tl.maximum(u, 0.0) - v * (power(v, TAIL_BF16) * ABOVE)
    elif dtype == tl.float16:
        v = tl.minimum(tl.abs(u), LARGEST_FP16, tl.PropagateNan.ALL)
        y = tl.maximum(u, 0.0) - v * (power(v, TAIL_FP16) * ABOVE)
    else:
        y = 0.5 * u * (1.0 + tl.erf(u * ROOT_HALF))
    return y


@triton.jit
def gelu_gradient(u, TANH: tl.constexpr, dtype: tl.constexpr):
    if TANH:
        u = tl.where(tl.abs(u) > 12.0, tl.where(u > 0, 12.0, -12.0), u)  # flat there; no inf * 0
        share, bell = tanh_parts(u)
        slope = share + 2.0 * u * bell * ((u * u * (3.0 * CUBIC) + 1.0) * ROOT_2_PI)
    elif dtype == tl.bfloat16:
        v = tl.minimum(tl.abs(u), LARGEST_BF16, tl.PropagateNan.ALL)
        below = (ROOT * ABOVE - v * ABOVE) * power(v, SLOPE_BF16)
        slope = tl.where(u < 0, below, 1.0 - below)
    elif dtype == tl.float16:
        v = tl.minimum(tl.abs(u), LARGEST_FP16, tl.PropagateNan.ALL)
        below = (ROOT * ABOVE - v * ABOVE) * power(v, SLOPE_FP16)
        slope = tl.where(u < 0, below, 1.0 - below)
    else:
        slope = 0.5 * (1.0 + tl.erf(u * ROOT_HALF)) + u * DENSITY * tl.exp(-0.5 * u * u)
    return slope


@kernel(do_not_specialize=["rows"])
def _forward(
    x,  # (rows, width)
    bias,  # (width,)
    out,  # (rows, width)
    rows,
    width,
    HAS_BIAS: tl.constexpr,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: blocks of columns, for each block of rows in turn."""
    columns = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // columns * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + col[None, :]
    u = tl.load(x + at, inside, 0.0).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias + col, col < width, 0.0).to(tl.float32)[None, :]
    y = gelu(u, TANH, out.dtype.element_ty)
    tl.store(out + at, y.to(out.dtype.element_ty), inside)


@kernel(do_not_specialize=["rows"])
def _backward(
    dout,  # (rows, width)
    x,  # (rows, width)
    bias,  # (width,)
    dx,  # (rows, width)
    partials,  # (programs, width) float32
    rows,
    width,
    HAS_BIAS: tl.constexpr,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of columns, programs); each program takes every programs-th block of rows."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + col, col < width, 0.0).to(tl.float32)[None, :]
    for begin in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + col[None, :]
        u = tl.load(x + at, inside, 0.0).to(tl.float32)
        if HAS_BIAS:
            u += shift
        slope = gelu_gradient(u, TANH, dx.dtype.element_ty)
        gradient = tl.load(dout + at, inside, 0.0).to(tl.float32) * slope
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), inside)
        total += tl.sum(gradient, 0)
    if HAS_BIAS:
        tl.store(partials + tl.program_id(1) * width + col, total, col < width)


@on_own_device("triton")
def gelu_forward(x, bias, approximate, out=None):
    out, width = torch.empty_like(x) if out is None else out, x.shape[-1]
    rows = x.numel() // width
    if rows:
        ROWS, BLOCK = tile_of_columns(x, FORWARD_BYTES)
        _forward[(cdiv(rows, ROWS) * cdiv(width, BLOCK),)](
            x, x if bias is None else bias.contiguous(), out, rows, width,
            HAS_BIAS=bias is not None, TANH=approximate == "tanh", ROWS=ROWS, BLOCK=BLOCK,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


@on_own_device("triton")
def gelu_backward(dout, x, bias, approximate, partial=False):
    """Returns dx and dbias (None without a bias); with ``partial``, in place of dbias the programs'
    own sums, (1, programs, width)."""
    dx, width = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // width
    ROWS, BLOCK, columns, programs = summing_grid(x, BACKWARD_BYTES, PROGRAMS)
    partials = None if bias is None else x.new_empty(1, programs, width, dtype=torch.float32)
    _backward[(columns, programs)](
        dout, x, x if bias is None else bias.contiguous(), dx, x if bias is None else partials,
        rows, width, HAS_BIAS=bias is not None, TANH=approximate == "tanh", ROWS=ROWS, BLOCK=BLOCK,
        enable_fp_fusion=True,
    )  # fmt: skip
    return dx, partials if partial or bias is None else summed(partials)[0]
