"""The ``triton`` backend: one file an op, each with its forward, backward and their launch.

The functions here take tensors that bert_fast.ops has validated, with the signatures of
bert_fast/backends/cpu.py.
"""

from bert_fast.kernels.attention import attention_backward, attention_forward
from bert_fast.kernels.common import column_partials, sums_of
from bert_fast.kernels.embedding import embedding_forward
from bert_fast.kernels.float8 import float8_forward
from bert_fast.kernels.gelu import gelu_backward, gelu_forward
from bert_fast.kernels.layer_norm import layer_norm_backward, layer_norm_forward
from bert_fast.kernels.linear import linear_gelu_forward

__all__ = [
    "attention_backward",
    "attention_forward",
    "column_partials",
    "embedding_forward",
    "float8_forward",
    "gelu_backward",
    "gelu_forward",
    "layer_norm_backward",
    "layer_norm_forward",
    "linear_gelu_forward",
    "sums_of",
]
