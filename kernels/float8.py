"""Rows rounded to float8 (e4m3), each with a scale of its own, as they stand or as layer-norm and
GELU make them: bert_fast.ops.reference.float8 in their epilogue.

A row's scale is its largest magnitude over all columns, so a program has whole rows in registers.
What they are rounded from is first rounded as layer-norm and GELU alone would store it: the same
numbers whether or not one kernel makes them.
"""

import torch
import triton
import triton.language as tl

from bert_fast.devices import on_own_device
from bert_fast.kernels.common import INTERPRETING, cdiv
from bert_fast.kernels.gelu import gelu
from bert_fast.kernels.launch import kernel
from bert_fast.kernels.layer_norm import normalised, tile

LARGEST, LEAST_SCALE = tl.constexpr(448.0), tl.constexpr(2.0**-126)  # as in the reference
MAGIC = tl.constexpr(2.0**14)  # its last bit is e4m3's smallest number, 2^-9
PLAIN, GELU, TANH, NORM = (tl.constexpr(i) for i in range(4))  # KIND: what is rounded


@triton.jit
def e4m3(x):
    """x, at most 448 in magnitude or NaN, to the nearest, ties to even."""
    if INTERPRETING:  # its own conversion cuts off subnormals and turns NaN into 384
        bits = tl.abs(x).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1) >> 20) - (120 << 3)  # from the bias 127 to 7
        small = (tl.abs(x) + MAGIC).to(tl.int32, bitcast=True) & 0xFF
        bits = tl.where(tl.abs(x) < 2.0**-6, small, bits)
        bits = tl.where(x == x, bits, 0x7F) | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)
        y = bits.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        y = x.to(tl.float8e4nv)
    return y


@kernel(do_not_specialize=["rows"])
def _forward(
    x,  # (rows, width)
    residual,  # (rows, width)
    linear_bias,  # (width,): added to x
    weight,  # (width,): layer-norm's
    bias,  # (width,)
    out,  # (rows, width): layer-norm's result
    elements,  # (rows, width) float8_e4m3fn
    scale,  # (rows,) float32
    rows,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_LINEAR_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: blocks of ROWS rows, each whole in registers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + col[None, :]
    y = tl.load(x + at, inside, 0.0).to(tl.float32)
    if HAS_LINEAR_BIAS:
        y += tl.load(linear_bias + col, col < width, 0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual + at, inside, 0.0).to(tl.float32)
    if KIND == NORM:
        y = normalised(y, weight, bias, x, x, row, col, rows, width, eps, False)
        tl.store(out + at, y.to(out.dtype.element_ty), inside)
    elif KIND != PLAIN:
        y = gelu(y, KIND == TANH, x.dtype.element_ty)
    y = y.to(x.dtype.element_ty).to(tl.float32)
    largest = tl.max(tl.where(inside & (y == y), tl.abs(y), 0.0), 1)
    factor = tl.maximum(tl.div_rn(largest, LARGEST), LEAST_SCALE)
    tl.store(scale + row, factor, row < rows)
    tl.store(elements + at, e4m3(y * tl.div_rn(1.0, factor)[:, None]), inside)


@on_own_device("triton")
def float8_forward(x, linear_bias=None, approximate=None, residual=None, norm=None):
    """(out, elements, scale): of ``x``, contiguous (rows, width); of GELU(x + linear_bias), where
    ``approximate`` is its; of LN(residual + x + linear_bias), the result ``out``, where ``norm`` is
    its (weight, bias, eps). Else out is None."""
    rows, width = x.shape
    weight, bias, eps = (x, x, 0.0) if norm is None else norm
    out = None if norm is None else torch.empty_like(x)
    elements = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    kind = NORM if norm is not None else {None: PLAIN, "none": GELU, "tanh": TANH}[approximate]
    ROWS, BLOCK, warps = tile(width, 8192 // x.element_size())
    if rows:
        _forward[(cdiv(rows, ROWS),)](
            x, x if residual is None else residual,
            x if linear_bias is None else linear_bias.contiguous(), weight.contiguous(),
            bias.contiguous(), x if out is None else out, elements, scale, rows, width, float(eps),
            HAS_RESIDUAL=residual is not None, HAS_LINEAR_BIAS=linear_bias is not None,
            KIND=kind.value, ROWS=ROWS, BLOCK=BLOCK, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out, elements, scale
