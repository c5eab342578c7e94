"""Custom kernels that make BERT fast: attention, layer-norm and GELU, forward and backward."""

import importlib
from typing import TYPE_CHECKING, Any

from bert_fast.backends import BackendUnavailableError, use_backend
from bert_fast.models.bert import BertModel, BertOutput
from bert_fast.models.config import BertConfig
from bert_fast.ops import (
    attention,
    attention_qkv,
    embedding_layer_norm,
    gelu,
    layer_norm,
    linear_gelu,
)

if TYPE_CHECKING:  # what __getattr__ below imports when it is used
    from bert_fast import nn as nn
    from bert_fast.embeddings.cross_encoder import CrossEncoder
    from bert_fast.embeddings.encoder import SentenceEncoder
    from bert_fast.files import CheckpointError
    from bert_fast.hugging_face import accelerate, restore
    from bert_fast.models.encoder_decoder import EncoderDecoderModel
    from bert_fast.models.graphs import cudagraph
    from bert_fast.models.heads import (
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
    )

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailableError",
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "BertOutput",
    "CheckpointError",
    "CrossEncoder",
    "EncoderDecoderModel",
    "SentenceEncoder",
    "accelerate",
    "attention",
    "attention_qkv",
    "cudagraph",
    "embedding_layer_norm",
    "gelu",
    "layer_norm",
    "linear_gelu",
    "nn",
    "restore",
    "use_backend",
]


# What most programs do not need is imported when it is.
_LATER = {
    "CheckpointError": "files",
    "EncoderDecoderModel": "models.encoder_decoder",
    "CrossEncoder": "embeddings.cross_encoder",
    "SentenceEncoder": "embeddings.encoder",
    "accelerate": "hugging_face",
    "cudagraph": "models.graphs",
    "restore": "hugging_face",
    **dict.fromkeys(
        (
            "BertForMaskedLM", "BertForMultipleChoice", "BertForNextSentencePrediction",
            "BertForPreTraining", "BertForQuestionAnswering", "BertForSequenceClassification",
            "BertForTokenClassification",
        ),
        "models.heads",
    ),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "nn":
        return importlib.import_module("bert_fast.nn")
    if name in _LATER:
        return getattr(importlib.import_module(f"bert_fast.{_LATER[name]}"), name)
    raise AttributeError(f"module 'bert_fast' has no attribute {name!r}")
