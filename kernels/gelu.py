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
from bert_fast.kernels.common import processors, summed
from bert_fast.kernels.launch import kernel

ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
ROOT_2_PI = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def tanh_parts(u):
    """(1 + t) / 2 and (1 - t^2) / 4, from exp(-2 |v|): nothing cancels or overflows."""
    v = (u + u * u * u * CUBIC) * ROOT_2_PI
    e = tl.exp(-2.0 * tl.abs(v))
    inverse = 1.0 / (1.0 + e)
    return tl.where(v > 0, inverse, e * inverse), e * inverse * inverse


@triton.jit
def gelu(u, TANH: tl.constexpr):
    if TANH:
        share, _ = tanh_parts(u)
        return u * share
    return 0.5 * u * (1.0 + tl.erf(u * ROOT_HALF))


@triton.jit
def gelu_gradient(u, TANH: tl.constexpr):
    if TANH:
        u = tl.where(tl.abs(u) > 12.0, tl.where(u > 0, 12.0, -12.0), u)  # flat there; no inf * 0
        share, bell = tanh_parts(u)
        return share + 2.0 * u * bell * ((u * u * (3.0 * CUBIC) + 1.0) * ROOT_2_PI)
    return 0.5 * (1.0 + tl.erf(u * ROOT_HALF)) + u * DENSITY * tl.exp(-0.5 * u * u)


@kernel(do_not_specialize=["rows"])
def _forward(
    x,  # (rows * width,)
    bias,  # (width,)
    out,  # (rows * width,)
    rows,
    width,
    HAS_BIAS: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # As a product: a width that is a multiple of 16 makes the bound one, and the access 16 bytes.
    size = rows.to(tl.int64) * width
    u = tl.load(x + at, at < size).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias + at % width, at < size).to(tl.float32)
    tl.store(out + at, gelu(u, TANH).to(out.dtype.element_ty), at < size)


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
        gradient = tl.load(dout + at, inside, 0.0).to(tl.float32) * gelu_gradient(u, TANH)
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), inside)
        total += tl.sum(gradient, 0)
    if HAS_BIAS:
        tl.store(partials + tl.program_id(1) * width + col, total, col < width)


@on_own_device("triton")
def gelu_forward(x, bias, approximate, out=None):
    out = torch.empty_like(x) if out is None else out
    size = x.numel()
    if size:
        # 4096 elements: 16-byte accesses for 256 threads, twice over. Not measured.
        _forward[(triton.cdiv(size, 4096),)](
            x, x if bias is None else bias, out, size // x.shape[-1], x.shape[-1],
            HAS_BIAS=bias is not None, TANH=approximate == "tanh", BLOCK=4096, num_warps=8,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


@on_own_device("triton")
def gelu_backward(dout, x, bias, approximate):
    """Returns dx and dbias (None without a bias)."""
    dx, width = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // width
    ROWS, BLOCK = 16, 128
    columns = triton.cdiv(width, BLOCK)
    # Enough programs to fill the chip twice; their number must not depend on anything else, for
    # it is the order of the sums.
    programs = max(1, triton.cdiv(2 * processors(x.device), columns))
    partials = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _backward[(columns, programs)](
        dout, x, x if bias is None else bias, dx, partials, rows, width,
        HAS_BIAS=bias is not None, TANH=approximate == "tanh", ROWS=ROWS, BLOCK=BLOCK,
        enable_fp_fusion=True,
    )  # fmt: skip
    return dx, None if bias is None else summed(partials)
