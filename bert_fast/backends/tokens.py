"""What a call reads of ids and masks on the CPU: csrc/cpu/tokens.h through pybind11."""

import torch

from bert_fast import _C

_CODES = {
    torch.bool: "B", torch.uint8: "B", torch.int8: "b", torch.int16: "h", torch.int32: "i",
    torch.int64: "q", torch.float32: "f", torch.float64: "d",
}  # fmt: skip


def range_of(ids):
    """(least, greatest)"""
    return _C.range_of(_CODES[ids.dtype], ids.data_ptr(), ids.numel())


def can_count(mask):
    return mask.dtype in _CODES and mask.numel() < 2**31


def real_tokens(mask):
    """(offsets, number, longest, shortest, places, whether it holds ones and zeros alone)"""
    batch, seqlen = mask.shape
    offsets = mask.new_empty(batch + 1, dtype=torch.int32)
    places = mask.new_empty(batch * seqlen, dtype=torch.int64)
    number, longest, shortest, valid = _C.real_tokens(
        _CODES[mask.dtype], mask.data_ptr(), batch, seqlen, offsets.data_ptr(), places.data_ptr()
    )
    return offsets, number, longest, shortest, places, valid


def means(x, cu_seqlens):
    """(batch, width) of (rows, width); None where the offsets are of other rows."""
    (rows, width), batch = x.shape, cu_seqlens.numel() - 1
    out = x.new_empty(batch, width)
    fit = _C.mean_rows(
        x.data_ptr(), rows, cu_seqlens.data_ptr(), batch, width, out.data_ptr()
    )  # fmt: skip
    return out if fit else None
