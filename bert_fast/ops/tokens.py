"""What a call reads of ids and masks: small integers, in one step where the ``cpu`` backend is
there and nobody looks on."""

import torch

from bert_fast import backends
from bert_fast.ops.library import is_unseen

_IDS = torch.int64, torch.int32


def range_of(ids):
    """(least, greatest) of at least one id, int32 or int64, on the CPU."""
    if _is_read_directly(ids):
        return backends.module("cpu").tokens.range_of(ids.contiguous())
    low, high = torch.aminmax(ids)
    return int(low), int(high)


def are_inside(ids, limits):
    """Whether integers of one shape (the first are; the others may be None), which nobody looks on
    (:func:`bert_fast.ops.library.is_unseen`), can be read where they are, and each is at least 0
    and below its limit."""
    first = ids[0]
    for tensor in ids:
        if (tensor is not None or tensor is first) and not (
            type(tensor) is torch.Tensor and tensor.is_cpu and tensor.dtype in _IDS
            and tensor.shape == first.shape and tensor.is_contiguous() and _is_in_memory(tensor)
        ):  # fmt: skip
            return False
    count = first.numel()
    return count > 0 and backends.module("cpu").Embeddings.are_inside(ids, limits, count)


def real_tokens(mask):
    """Of a (batch, seqlen) mask on the CPU: offsets of the sequences among the real tokens, int32
    (batch + 1,); the longest; whether none is empty; and each real token's place in the flattened
    batch, int64, or None where all are real. None where torch's ops have to be asked for it.

    Raises:
        ValueError: the mask holds something else than ones and zeros.
    """
    if not _is_read_directly(mask):
        return None
    tokens = backends.module("cpu").tokens
    if not tokens.can_count(mask):
        return None
    offsets, number, longest, shortest, places, valid = tokens.real_tokens(mask.contiguous())
    if not valid and mask.dtype == torch.bool:  # another byte's view
        return None
    if not valid:
        raise ValueError("attention_mask must hold ones and zeros alone")
    return offsets, longest, shortest > 0, None if number == mask.numel() else places[:number]


def means(x, cu_seqlens):
    """Of (total_tokens, width) the mean of each sequence, (batch, width), added up in order, zeros
    of one without tokens. None where torch's ops have to be asked for it."""
    if (
        torch.is_grad_enabled() or x.dtype != torch.float32 or cu_seqlens.dtype != torch.int32
        or not (x.is_cpu and cu_seqlens.is_cpu and x.ndim == 2 and cu_seqlens.ndim == 1)
        or not (x.is_contiguous() and cu_seqlens.is_contiguous() and cu_seqlens.shape[0] > 0)
        or not (_is_read_directly(x) and _is_read_directly(cu_seqlens))
    ):  # fmt: skip
        return None
    return backends.module("cpu").tokens.means(x, cu_seqlens)


def _is_in_memory(tensor):
    """Neither a view by which numbers are negated, nor zeros that have no memory."""
    return not tensor.is_neg() and not tensor._is_zerotensor()


def _is_read_directly(tensor):
    plain = is_unseen((tensor,)) and _is_in_memory(tensor)
    return plain and backends.why_unavailable("cpu") is None
