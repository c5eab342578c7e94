"""Which of transformers' models can be accelerated, and where each family keeps the parts of a
layer; why a model, or a call, is left to transformers."""

import functools
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from bert_fast.models.blocks import GELU_APPROXIMATE


@dataclass(frozen=True)
class Family:
    """Where a family keeps what a layer of BERT consists of. Paths start at the layer."""

    encoder: str = "encoder"  # the module with the layers, in the model
    activation: str = "hidden_act"  # in the config
    qkv: tuple = ("attention.self.query", "attention.self.key", "attention.self.value")
    attention_dropout: str = "attention.self.dropout"
    out: str = "attention.output.dense"
    out_dropout: str | None = "attention.output.dropout"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    down_dropout: str = "output.dropout"
    norm: str = "output.LayerNorm"
    output: str = "BaseModelOutputWithPastAndCrossAttentions"  # the encoder's, of transformers

    def linears(self):
        return *self.qkv, self.out, self.up, self.down


BERT = Family()
FAMILIES = {
    "BertModel": BERT,
    "RobertaModel": BERT,
    "XLMRobertaModel": BERT,
    "CamembertModel": BERT,
    "ElectraModel": BERT,
    "DistilBertModel": Family(
        encoder="transformer",
        activation="activation",
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        attention_dropout="attention.dropout",
        out="attention.out_lin",
        out_dropout=None,
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        down_dropout="ffn.dropout",
        norm="output_layer_norm",
        output="BaseModelOutput",
    ),
}


def family_of(module):
    kind = type(module)
    return FAMILIES.get(kind.__name__) if kind.__module__.startswith("transformers.") else None


def why_not(base):
    """Why a model cannot be accelerated at all, or None."""
    config, family = base.config, family_of(base)
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "it is a decoder"
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        return f"its position_embedding_type is {positions!r}"
    activation = getattr(config, family.activation)
    if activation not in GELU_APPROXIMATE:
        return (
            f"its {family.activation} is {activation!r}, not one of {', '.join(GELU_APPROXIMATE)}"
        )
    for i, layer in enumerate(getattr(base, family.encoder).layer):
        for path in family.linears():
            linear = layer.get_submodule(path)
            if type(linear) is not nn.Linear or linear.bias is None:
                return f"layer {i}'s {path} is no plain nn.Linear with a bias, but {linear}"
    return None


def why_not_this_call(mask, arguments):
    """Why one call runs as it did before, or None."""
    for name in ("head_mask", "encoder_hidden_states", "past_key_values", "cache"):
        if arguments.get(name) is not None:
            return name
    if arguments.get("output_attentions"):
        return "output_attentions"
    if mask is not None and (not torch.is_tensor(mask) or mask.ndim != 2):
        return "an attention_mask that is not (batch, seqlen)"
    return None


@functools.cache
def warn_once(name, reason):
    warnings.warn(f"bert_fast leaves {name} to transformers in calls with {reason}", stacklevel=5)
