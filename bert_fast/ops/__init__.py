"""The ops: what users call, what ``torch.library`` knows, what backends do. One file an op."""

from bert_fast.ops import reference
from bert_fast.ops.attention import attention, attention_qkv
from bert_fast.ops.checks import check_cu_seqlens, is_concrete
from bert_fast.ops.embedding import embedding_layer_norm
from bert_fast.ops.encoder import (
    all_run_in_one_call,
    bind_embeddings,
    bind_encoder,
    runs_in_one_call,
    unchanged,
    without_openmp,
)
from bert_fast.ops.float8 import (
    Float8Weight,
    Rounded,
    Rows,
    float8,
    gelu_float8,
    layer_norm_float8,
    scaled_product,
)
from bert_fast.ops.gelu import gelu
from bert_fast.ops.layer_norm import layer_norm
from bert_fast.ops.linear import (
    can_use_packed,
    is_fast,
    linear_gelu,
    pack_weight,
    unpacked_weight,
    why_not_packed,
)
from bert_fast.ops.repeat import Repeat, can_repeat, circumstances, launches
from bert_fast.ops.tokens import are_inside, means, range_of, real_tokens
from bert_fast.ops.training_layer import Numbers, Seeds, training_layer

__all__ = [
    "Float8Weight",
    "Numbers",
    "Repeat",
    "Rounded",
    "Rows",
    "Seeds",
    "all_run_in_one_call",
    "are_inside",
    "attention",
    "attention_qkv",
    "bind_embeddings",
    "bind_encoder",
    "can_repeat",
    "can_use_packed",
    "check_cu_seqlens",
    "circumstances",
    "embedding_layer_norm",
    "float8",
    "gelu",
    "gelu_float8",
    "is_concrete",
    "is_fast",
    "launches",
    "layer_norm",
    "layer_norm_float8",
    "linear_gelu",
    "means",
    "pack_weight",
    "range_of",
    "real_tokens",
    "reference",
    "runs_in_one_call",
    "scaled_product",
    "training_layer",
    "unchanged",
    "unpacked_weight",
    "why_not_packed",
    "without_openmp",
]
