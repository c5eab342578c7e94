"""Attention libraries for NVIDIA GPUs."""

import torch

from bert_fast.bench.contestant import Run
from bert_fast.bench.peers.peer import Peer


class FlashAttention(Peer):
    name, package = "flash-attn", "flash_attn"
    devices, dtypes = ("cuda",), (torch.bfloat16, torch.float16)

    def attention(self, work, inputs):
        from flash_attn import flash_attn_varlen_qkvpacked_func

        (qkv, dout), cu = inputs, work.cu_seqlens
        forward = lambda: flash_attn_varlen_qkvpacked_func(  # noqa: E731
            qkv, cu, work.max_seqlen, causal=work.causal
        )
        return Run(forward, leaves=(qkv,), dout=dout)


class Xformers(Peer):
    name, package = "xformers", "xformers"
    devices = ("cuda",)

    def attention(self, work, inputs):
        from xformers.ops import fmha

        qkv, dout = inputs
        blocks = fmha.attn_bias.BlockDiagonalMask.from_seqlens(list(work.lengths))
        blocks = blocks.make_causal() if work.causal else blocks
        forward = lambda: fmha.memory_efficient_attention(  # noqa: E731
            *(t[None] for t in qkv.unbind(1)), attn_bias=blocks
        )[0]
        return Run(forward, leaves=(qkv,), dout=dout)
