"""Token vectors to one vector per text, in sentence-transformers' ways."""

import torch

from bert_fast import ops
from bert_fast.ops import reference

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def pool(hidden, cu_seqlens, how="mean", skip=0):
    """(total_tokens, hidden) -> (batch, hidden): of each sequence

    - ``cls``: the first token;
    - ``max``, ``mean``: over its tokens;
    - ``mean_sqrt_len_tokens``: their sum over the square root of their number;
    - ``weightedmean``: the mean with weights 1, 2, 3 ... along the sequence;
    - ``lasttoken``: the last token.

    ``skip``: so many tokens at the front, a prompt's, do not count (a weight stays its token's
    own). A sequence that has none left is zero; its first token is then still ``cls``.
    """
    if how == "mean" and not skip and (found := ops.means(hidden, cu_seqlens)) is not None:
        return found
    batch, width = cu_seqlens.numel() - 1, hidden.shape[1]
    lengths = cu_seqlens.diff().long()
    if not len(hidden):
        return hidden.new_zeros(batch, width)
    begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if how in ("cls", "lasttoken"):
        token = begin + torch.where(lengths > skip, skip, 0) if how == "cls" else end - 1
        empty = lengths == 0 if how == "cls" else lengths <= skip
        token = token.clamp(0, hidden.shape[0] - 1)
        return hidden[token].masked_fill(empty[:, None], 0)
    sequence, position = reference.sequence_of_token(cu_seqlens, hidden.shape[0])
    if skip:
        keep = position >= skip
        hidden, sequence, position = hidden[keep], sequence[keep], position[keep]
        lengths = (lengths - skip).clamp(min=0)
    if how == "max":
        index = sequence[:, None].expand_as(hidden)
        top = hidden.new_full((batch, width), -torch.inf).scatter_reduce_(0, index, hidden, "amax")
        return top.masked_fill(lengths[:, None] == 0, 0)
    if how == "weightedmean":
        weight = (position + 1).to(hidden.dtype)
        total = hidden.new_zeros(batch, width).index_add_(0, sequence, hidden * weight[:, None])
        divisor = hidden.new_zeros(batch).index_add_(0, sequence, weight).clamp(min=1)
    else:
        total = hidden.new_zeros(batch, width).index_add_(0, sequence, hidden)
        divisor = lengths.clamp(min=1).to(hidden.dtype)
        if how == "mean_sqrt_len_tokens":
            divisor = divisor.sqrt()
    return total / divisor[:, None]
