"""LN(word[i] + position[p] + token_type[t]) * weight + bias of packed ids, as one kernel.

The sum of three rows is normalised while it is in registers; training stores it with its mean and
rstd, which are what layer-norm's backward kernel takes. The tables' gradients are sums over equal
ids, which torch's embedding makes in a fixed order.
"""

import torch
import triton
import triton.language as tl

from bert_fast.devices import on_own_device
from bert_fast.kernels.common import cdiv
from bert_fast.kernels.launch import kernel
from bert_fast.kernels.layer_norm import normalise, tile


@triton.jit
def _row_of(table, ids, row, rows, col, width, size):
    """Rows of a table by number; an id outside of it stops the kernel, as torch's does."""
    i = tl.load(ids + row, row < rows, 0).to(tl.int64)
    tl.device_assert((i >= 0) & (i < size), "an id is outside of its embedding table")
    inside = (row < rows)[:, None] & (col < width)[None, :]
    return tl.load(table + i[:, None] * width + col[None, :], inside, 0.0).to(tl.float32)


@kernel(do_not_specialize=["rows"])
def _forward(
    input_ids, position_ids, token_type_ids,  # (rows,) int32 or int64
    word,  # (vocab_size, width)
    position,  # (max_position_embeddings, width)
    token_type,  # (type_vocab_size, width)
    weight, bias,  # (width,)
    out,  # (rows, width)
    total,  # (rows, width): the sum, for backward
    mean, rstd,  # (rows,) float32
    rows, width, vocab_size, positions, types, eps,
    HAS_TYPES: tl.constexpr,  # without: type 0 everywhere
    TRAINING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of ROWS rows, each whole in registers."""
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    s = _row_of(word, input_ids, row, rows, col, width, vocab_size)
    s += _row_of(position, position_ids, row, rows, col, width, positions)
    if HAS_TYPES:
        s += _row_of(token_type, token_type_ids, row, rows, col, width, types)
    else:
        s += tl.load(token_type + col, col < width, 0.0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & (col < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + col[None, :]
    if TRAINING:
        tl.store(total + at, s.to(total.dtype.element_ty), inside)
    normalise(s, weight, bias, out, mean, rstd, row, col, rows, width, eps, TRAINING)


@on_own_device("triton")
def embedding_forward(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps, dtype,
    training,
):  # fmt: skip
    """Returns out, and for backward the normalised sum, mean and rstd (else None)."""
    rows, width = input_ids.numel(), word.shape[1]
    out = word.new_empty(rows, width, dtype=dtype)
    total = torch.empty_like(out) if training else None
    mean, rstd = (word.new_empty(rows, dtype=torch.float32) if training else None for _ in range(2))
    ROWS, BLOCK, warps = tile(width, 4096 // word.element_size())
    if rows:
        _forward[(cdiv(rows, ROWS),)](
            input_ids, position_ids, input_ids if token_type_ids is None else token_type_ids, word,
            position, token_type, weight.contiguous(), bias.contiguous(), out,
            *(out if t is None else t for t in (total, mean, rstd)), rows, width,
            word.shape[0], position.shape[0], token_type.shape[0], eps,
            HAS_TYPES=token_type_ids is not None, TRAINING=training,
            ROWS=ROWS, BLOCK=BLOCK, num_warps=warps, debug=True, sanitize_overflow=False,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out, total, mean, rstd
