"""``attn_implementation="bert_fast"``: the attention alone, for any of transformers' models."""

import contextlib
import math

from bert_fast import ops
from bert_fast.hugging_face.accelerated import packing_of
from bert_fast.models.packing import Packing


def attention_forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs
):
    """transformers' interface: q, k, v are (batch, num_heads, seqlen, head_dim), the mask is what
    transformers gives FlashAttention, (batch, seqlen_k) or None."""
    batch, num_heads, seqlen, head_dim = query.shape
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    if causal and attention_mask is not None:
        raise ValueError("attn_implementation 'bert_fast': causal attention takes no padding mask")
    seqlen_k, device = key.shape[2], query.device
    keys = packing_of(attention_mask, (batch, seqlen_k), device)
    if attention_mask is not None and seqlen == seqlen_k:
        queries = keys
    else:
        queries = Packing.of_full(batch, seqlen, device)
    groups = num_heads // key.shape[1]  # of queries, that share a key
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    q, k, v = (
        packing.pack(t.transpose(1, 2))
        for packing, t in ((queries, query), (keys, key), (keys, value))
    )
    out = ops.attention(
        q, k, v, queries.cu_seqlens, keys.cu_seqlens,
        max_seqlen=queries.max_seqlen, max_seqlen_k=keys.max_seqlen,
        softmax_scale=1 / math.sqrt(head_dim) if scaling is None else scaling,
        causal=causal and seqlen > 1, dropout_p=dropout, padded_tail=queries.padded_tail,
    )  # fmt: skip
    return queries.unpack(out), None


def register():
    """Makes ``attn_implementation="bert_fast"`` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    masks = AttentionMaskInterface()
    AttentionInterface.register("bert_fast", attention_forward)
    AttentionMaskInterface.register("bert_fast", masks["flash_attention_2"])


with contextlib.suppress(ImportError):  # no transformers: nobody to tell
    register()
