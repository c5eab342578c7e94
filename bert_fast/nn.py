"""Layers alone, for models that are not BERT: torch's names and weights, our kernels.

``EncoderLayer`` loads the ``state_dict`` of ``torch.nn.TransformerEncoderLayer`` and may stand in
``torch.nn.TransformerEncoder`` (``enable_nested_tensor=False``).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_fast import ops
from bert_fast.models.blocks import View, project_add_norm
from bert_fast.models.packing import Packing
from bert_fast.models.workspace import NoWorkspace

Device = torch.device | str | int | None


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` over the last dimension; may add a residual first."""

    def __init__(
        self, normalized_shape: int | tuple[int], eps: float = 1e-5, bias: bool = True,
        device: Device = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__(normalized_shape, eps=eps, device=device, dtype=dtype, bias=bias)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"normalized_shape must be one number, not {normalized_shape}")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """LN(x + residual)"""
        bias = torch.zeros_like(self.weight) if self.bias is None else self.bias
        return ops.layer_norm(x, self.weight, bias, residual=residual, eps=self.eps)


class GELU(nn.GELU):
    """``torch.nn.GELU``."""

    approximate: Literal["none", "tanh"]

    def forward(self, x: Tensor) -> Tensor:
        return ops.gelu(x, approximate=self.approximate)


class Attention(nn.Module):
    """Self-attention with the weights of ``torch.nn.MultiheadAttention(batch_first=True)``."""

    batch_first = True

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, device: Device = None,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **to))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim, **to))
        self.out_proj = nn.Linear(embed_dim, embed_dim, **to)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x: Tensor, key_padding_mask: Tensor | None = None, is_causal: bool = False, *,
        cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
    ) -> Tensor:  # fmt: skip
        """
        Args:
            x: (batch, seqlen, embed_dim); or packed, (total_tokens, embed_dim), with cu_seqlens.
            key_padding_mask: torch's: (batch, seqlen), True (or -inf) at padding.
            is_causal: no token sees a later one.
            cu_seqlens, max_seqlen: see :func:`bert_fast.attention`.

        Returns:
            x's shape; zeros, and the projection's bias, at padding.
        """
        packing, packed = _pack(x, key_padding_mask, cu_seqlens, max_seqlen)
        out = self.out_proj(self.attend(packed, packing, is_causal))
        return out if cu_seqlens is not None else packing.unpack(out)

    def attend(self, x, packing, is_causal):
        """Packed, and without the last projection."""
        shape = 3, self.num_heads, self.embed_dim // self.num_heads
        qkv, bias = View(self.in_proj_weight, self.in_proj_bias).project(x, None, NoWorkspace())
        return ops.attention_qkv(
            qkv.view(-1, *shape), packing.cu_seqlens, max_seqlen=packing.max_seqlen,
            bias=None if bias is None else bias.view(shape), causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0, padded_tail=packing.padded_tail,
        ).view(-1, self.embed_dim)  # fmt: skip


class EncoderLayer(nn.Module):
    """``torch.nn.TransformerEncoderLayer``, post-norm with GELU, as BERT's layers are."""

    norm_first = False

    def __init__(
        self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "gelu", layer_norm_eps: float = 1e-5,
        batch_first: bool = True, norm_first: bool = False, bias: bool = True,
        device: Device = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        if activation not in ("gelu", F.gelu) and not isinstance(activation, nn.GELU):
            raise ValueError(f"activation must be 'gelu', not {activation!r}")
        for name, value, only in (
            ("batch_first", batch_first, True), ("norm_first", norm_first, False),
            ("bias", bias, True),
        ):  # fmt: skip
            if value is not only:
                raise ValueError(f"{name} must be {only}")
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        self.self_attn = Attention(d_model, nhead, dropout, **to)
        self.linear1 = nn.Linear(d_model, dim_feedforward, **to)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **to)
        self.norm1 = LayerNorm(d_model, eps=layer_norm_eps, **to)
        self.norm2 = LayerNorm(d_model, eps=layer_norm_eps, **to)
        self.dropout_p = dropout
        self.approximate = getattr(activation, "approximate", "none")

    def forward(
        self, src: Tensor, src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None, is_causal: bool = False, *,
        cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
    ) -> Tensor:  # fmt: skip
        """src, src_key_padding_mask, is_causal, cu_seqlens: as :meth:`Attention.forward` has them.
        src_mask is read where is_causal says that it is the causal one, and refused else. Zeros at
        padding."""
        if src_mask is not None and not is_causal:
            raise ValueError("src_mask: masks by pair of tokens are not supported, but is_causal")
        packing, x = _pack(src, src_key_padding_mask, cu_seqlens, max_seqlen)
        p, fresh = self.dropout_p if self.training else 0.0, NoWorkspace()
        attended = self.self_attn.attend(x, packing, is_causal)
        x = project_add_norm(attended, _view(self.self_attn.out_proj), self.norm1, x, p, fresh)
        up = _view(self.linear1).gelu(x, self.approximate, None, fresh)
        x = project_add_norm(F.dropout(up, p), _view(self.linear2), self.norm2, x, p, fresh)
        return x if cu_seqlens is not None else packing.unpack(x)


def _view(linear):
    return View(linear.weight, linear.bias)


def _pack(x, key_padding_mask, cu_seqlens, max_seqlen):
    if cu_seqlens is not None:
        if x.ndim != 2 or key_padding_mask is not None:
            raise ValueError("with cu_seqlens x must be (total_tokens, width), without masks")
        length = ops.check_cu_seqlens("cu_seqlens", cu_seqlens, len(x), x.device, max_seqlen, False)
        return Packing(cu_seqlens, length, None, 1, len(x)), x
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, seqlen, width), not {tuple(x.shape)}")
    if key_padding_mask is None:
        packing = Packing.of_full(*x.shape[:2], x.device)
        return packing, packing.pack(x)
    if key_padding_mask.shape != x.shape[:2]:
        raise ValueError(
            f"key_padding_mask must be {tuple(x.shape[:2])}, not {tuple(key_padding_mask.shape)}"
        )
    packing = Packing.of_mask(key_padding_mask == 0).to(x.device)
    return packing, packing.pack(x)
