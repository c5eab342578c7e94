"""Custom kernels that make BERT fast: attention, layer-norm and GELU, forward and backward."""

from bert_fast.backends import BackendUnavailableError, use_backend
from bert_fast.model import BertConfig, BertModel, BertOutput
from bert_fast.ops import (
    attention,
    attention_qkv,
    embedding_layer_norm,
    gelu,
    layer_norm,
    linear_gelu,
)

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailableError",
    "BertConfig",
    "BertModel",
    "BertOutput",
    "CheckpointError",
    "SentenceEncoder",
    "attention",
    "attention_qkv",
    "embedding_layer_norm",
    "gelu",
    "layer_norm",
    "linear_gelu",
    "use_backend",
]


def __getattr__(name):  # what most programs do not need is imported when it is
    if name == "SentenceEncoder":
        from bert_fast.text import SentenceEncoder

        return SentenceEncoder
    if name == "CheckpointError":
        from bert_fast.checkpoint import CheckpointError

        return CheckpointError
    raise AttributeError(f"module 'bert_fast' has no attribute {name!r}")
