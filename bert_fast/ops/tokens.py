"""What a call reads of ids and masks: small integers, in one step where the ``cpu`` backend is
there and nobody looks on."""

import torch

from bert_fast import backends
from bert_fast.ops.library import is_unseen


def range_of(ids):
    """(least, greatest) of at least one id, int32 or int64, on the CPU."""
    if _is_read_directly(ids):
        return backends.module("cpu").tokens.range_of(ids.contiguous())
    low, high = torch.aminmax(ids)
    return int(low), int(high)


def real_tokens(mask):
    """Of a (batch, seqlen) mask on the CPU: offsets of the sequences among the real tokens, int32
    (batch + 1,); the longest; and each real token's place in the flattened batch, int64, or None
    where all are real. None where torch's ops have to be asked for it.

    Raises:
        ValueError: the mask holds something else than ones and zeros.
    """
    if not _is_read_directly(mask):
        return None
    tokens = backends.module("cpu").tokens
    if not tokens.can_count(mask):
        return None
    offsets, number, longest, places, valid = tokens.real_tokens(mask.contiguous())
    if not valid and mask.dtype == torch.bool:  # another byte's view
        return None
    if not valid:
        raise ValueError("attention_mask must hold ones and zeros alone")
    return offsets, longest, None if number == mask.numel() else places[:number]


def _is_read_directly(tensor):
    # Neither a view by which numbers are negated, nor zeros that have no memory.
    plain = is_unseen((tensor,)) and not tensor.is_neg() and not tensor._is_zerotensor()
    return plain and backends.why_unavailable("cpu") is None
