"""Token vectors to one vector per text, by the checkpoint's own 1_Pooling/config.json."""

import torch

from bert_fast.embeddings.settings import read_json
from bert_fast.models.checkpoint import CheckpointError
from bert_fast.ops import reference

# sentence-transformers' names for how token vectors become one vector.
POOLING = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


def read_pooling(directory):
    """The key of :func:`pool` that 1_Pooling/config.json chooses; "mean" without that file."""
    settings = read_json(directory / "1_Pooling" / "config.json")
    chosen = [
        mode for mode, value in settings.items() if mode.startswith("pooling_mode_") and value
    ]
    if not settings:
        return "mean"
    if len(chosen) != 1 or chosen[0] not in POOLING:
        raise CheckpointError(
            f"{directory}/1_Pooling/config.json: {chosen} is not one of {list(POOLING)}"
        )
    return POOLING[chosen[0]]


def pool(hidden, cu_seqlens, how):
    """(total_tokens, hidden) -> (batch, hidden): each sequence's mean, max or first token; zeros
    for an empty sequence."""
    batch, width = cu_seqlens.numel() - 1, hidden.shape[1]
    lengths = cu_seqlens.diff()[:, None]
    sequence, _ = reference.sequence_of_token(cu_seqlens, hidden.shape[0])
    if how == "mean":
        total = hidden.new_zeros(batch, width).index_add_(0, sequence, hidden)
        return total / lengths.clamp(min=1)
    if how == "max":
        index = sequence[:, None].expand_as(hidden)
        top = hidden.new_full((batch, width), -torch.inf).scatter_reduce_(0, index, hidden, "amax")
        return top.masked_fill(lengths == 0, 0)
    first = cu_seqlens[:-1].long().clamp(max=max(hidden.shape[0] - 1, 0))
    return (
        hidden[first].masked_fill(lengths == 0, 0)
        if len(hidden)
        else hidden.new_zeros(batch, width)
    )
