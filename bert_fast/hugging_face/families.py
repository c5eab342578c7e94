"""Which of transformers' models can be accelerated, and where each family keeps the parts of a
layer; what its encoder returns; why a model, or a call, is left to transformers."""

import collections
import copy
import functools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from bert_fast import ops
from bert_fast.models.arguments import ATTENTIONS
from bert_fast.models.blocks import GELU_APPROXIMATE
from bert_fast.models.watch import are_all_watched


@dataclass(frozen=True)
class Family:
    """Where a family keeps what a layer of BERT consists of. Paths start at the layer."""

    encoder: str = "encoder"  # the module with the layers, in the model
    activation: str = "hidden_act"  # in the config
    qkv: tuple = ("attention.self.query", "attention.self.key", "attention.self.value")
    attention_dropout: str = "attention.self.dropout"
    attention_trains: str = "attention.self"  # the module whose ``training`` lets that drop
    out: str = "attention.output.dense"
    out_dropout: str | None = "attention.output.dropout"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    down_dropout: str = "output.dropout"
    norm: str = "output.LayerNorm"
    output: str = "BaseModelOutputWithPastAndCrossAttentions"  # the encoder's, of transformers
    position_bias: str | None = None  # the encoder's method that gives its relative positions

    def linears(self):
        return *self.qkv, self.out, self.up, self.down

    def norms(self):
        return self.attention_norm, self.norm


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
        attention_trains="attention",
        out="attention.out_lin",
        out_dropout=None,
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        down_dropout="ffn.dropout",
        norm="output_layer_norm",
        output="BaseModelOutput",
    ),
    "MPNetModel": Family(
        qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        attention_dropout="attention.attn.dropout",
        attention_trains="attention.attn.dropout",
        out="attention.attn.o",
        out_dropout="attention.dropout",
        attention_norm="attention.LayerNorm",
        norm="output.LayerNorm",
        output="BaseModelOutput",
        position_bias="compute_position_bias",
    ),
}


def family_of(module):
    kind = type(module)
    return FAMILIES.get(kind.__name__) if kind.__module__.startswith("transformers.") else None


@functools.cache
def _empty(output):
    """What such a class keeps in its attributes of nothing at all."""
    return dict(vars(output()))


def output_of(output, x):
    """output(last_hidden_state=x), a ModelOutput: without its constructor, which goes through its
    fields once for each of them."""
    if torch.compiler.is_compiling():
        return output(last_hidden_state=x)
    out = output.__new__(output)
    vars(out).update(_empty(output), last_hidden_state=x)
    collections.OrderedDict.__setitem__(out, "last_hidden_state", x)
    return out


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
    return None


def why_not_this_call(config, mask, arguments):
    """Why one call runs as it did before, or None."""
    for name in ("head_mask", "encoder_hidden_states", "past_key_values", "cache"):
        if arguments.get(name) is not None:
            return name
    if arguments.get("output_attentions"):
        return "output_attentions"
    implementation = getattr(config, "_attn_implementation", None) or "eager"
    if implementation not in ATTENTIONS:
        return f"the attention {implementation!r}"
    if not torch.compiler.is_compiling():
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        function = ALL_ATTENTION_FUNCTIONS.get(implementation)
        if function is not None and not _is_theirs(function):
            return f"an attention {implementation!r} of somebody's own"
        if torch._C._are_functorch_transforms_active():
            return "a transform of torch.func"
    if getattr(config, "is_decoder", False):
        return "is_decoder"
    if mask is not None and (not torch.is_tensor(mask) or mask.ndim != 2):
        return "an attention_mask that is not (batch, seqlen)"
    return None


def is_linear(module):
    """Whether a module stands where a linear layer did and computes each token by itself: plain, of
    another class (quantised, parametrised), or a peft adapter around one."""
    return isinstance(module, nn.Linear) or (
        type(module).__module__.startswith("peft.tuners.") and hasattr(module, "base_layer")
    )


# What was found right of a model's modules when they were last looked at in full; and what of its
# layers was kept since: gone with the first change.
_seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def kept_of(base):
    """A dictionary to keep things of a model's layers in, as long as :func:`why_not_this_state`
    finds its modules as they were."""
    if torch.compiler.is_compiling() or (seen := _seen.get(base)) is None:
        return {}
    return seen[1]


def _is_theirs(function):
    """Whether a function is transformers', torch's or ours, and not put in its place."""
    return str(function.__module__).partition(".")[0] in ("transformers", "torch", "bert_fast")


def why_not_this_state(base, family, classes):
    """Why a model that was accelerated must run on transformers' own code as it is now, or None:
    somebody looks at what passes between its modules, or has put another module, attribute or
    forward in. ``classes``: of :func:`classes_inside`. Asked in every call: where nothing has
    changed since the last it takes some microseconds a layer."""
    if are_all_watched():
        return "hooks on all modules"
    encoder = getattr(base, family.encoder)
    if torch.compiler.is_compiling():
        return _why_not(encoder, family, classes)
    for known in classes.values():
        if known.kind.forward is not known.forward:
            return f"a forward of somebody's own in {known.kind.__name__}"
    seen = _seen.get(base)
    if seen is not None and seen[0].hold():
        return None
    if reason := _why_not(encoder, family, classes):
        return reason
    if (now := _look(base, family.encoder)) is not None:
        _seen[base] = now, {}
    else:
        _seen.pop(base, None)
    return None


def _look(base, name):
    """What says whether a model has the encoder that it has now, whose modules have the classes,
    children, hooks and attributes of now; None where nothing can."""
    encoder = getattr(base, name)
    kinds, values, contents = [], [(base._modules, name, encoder)], []
    for module in encoder.modules():
        own, kept = module.__dict__, ("_modules", *_HOOKS)
        names = "forward", "_compiled_call_impl", *kept
        kinds.append((module, type(module)))
        values.extend((own, name, own.get(name)) for name in names)
        values.extend((own["_modules"], *named) for named in own["_modules"].items())
        values.extend((own, name, own[name]) for name in _attributes(module))
        contents.extend((own[name], list(own[name].values())) for name in kept)
    return ops.unchanged(kinds, values, contents, [])


def _why_not(encoder, family, classes):
    if not hasattr(encoder, "_bert_fast"):
        return f"an encoder, a {type(encoder).__name__}, that was not accelerated"
    if encoder.__dict__.get("_compiled_call_impl") is not None:  # its model's packing is not in it
        return f"the {family.encoder}, which is compiled by itself"
    if reason := _watched(encoder, family.encoder):
        return reason
    linears = family.linears()
    for number, layer in enumerate(encoder.layer):
        if getattr(type(layer), "inherited", None) is not classes[""].kind:
            return f"layer {number}, which is a {type(layer).__name__} that was not accelerated"
        for path, module in _inside(layer, ""):
            if reason := _watched(module, f"layer {number} {path}".rstrip()):
                return reason
            if path in linears:
                known = is_linear(module)
            elif path == "" or path.startswith(tuple(f"{linear}." for linear in linears)):
                known = True  # a layer was looked at; what is in a linear layer's place is its own
            else:
                known = path in classes and type(module) is classes[path].kind
                if path in family.norms():
                    known = known and module.weight is not None and module.bias is not None
            if not known:
                return f"layer {number}'s {path}, which is a {type(module).__name__}"
            if path in classes and path not in linears:
                for name, value in classes[path].attributes.items():
                    if not _same(getattr(module, name, None), value):
                        return f"a {name} of its own on layer {number} {path}".rstrip()
    return None


class Known(NamedTuple):
    """A module as transformers makes it."""

    kind: type
    attributes: dict
    forward: Callable | None  # None: somebody else's


def classes_inside(base, family):
    """{path: :class:`Known`} of a layer and its modules, as transformers makes them of the config;
    ".." is the encoder."""
    with torch.device("meta"):
        fresh = type(base)(copy.deepcopy(base.config))
    encoder = getattr(fresh, family.encoder)
    modules = {"..": encoder, **dict(_inside(encoder.layer[0], ""))}
    return {path: _known(module) for path, module in modules.items()}


def _known(module):
    forward = type(module).forward
    return Known(type(module), _attributes(module), forward if _is_theirs(forward) else None)


# Those whose attributes are read when they are needed, or not at all: rates, eps, sizes.
_READ = nn.Linear, nn.LayerNorm, nn.Dropout
_NO_NUMBER = {"training", "layer_idx", "gradient_checkpointing", "chunk_size_feed_forward"}


def _attributes(module):
    """What a module's forward may read of the module itself: numbers, names and functions."""
    if isinstance(module, _READ):
        return {}
    return {
        name: value
        for name, value in module.__dict__.items()
        if name[0] != "_" and name not in _NO_NUMBER
        and (isinstance(value, bool | int | float | str) or callable(value))
    }  # fmt: skip


def _same(found, value):
    if not callable(value):
        return type(found) is type(value) and found == value
    if torch.compiler.is_compiling():
        return True
    return _function(found) == _function(value)


def _function(value):
    """Of a method or a partial call, which are made anew for each module, what they are made of."""
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    return getattr(value, "__func__", value)


def _inside(module, path):
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _inside(child, f"{path}.{name}" if path else name)


def _watched(module, name):
    own = module.__dict__
    for kind in _HOOKS:
        hooks = own.get(kind)
        if hooks and not all(_minds_its_own(hook) for hook in hooks.values()):
            return f"hooks on {name}"
    if "forward" in own:
        return f"a forward of its own on {name}"
    return None


_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def _minds_its_own(hook):
    """torch's sharding gathers parameters in hooks, and looks at no activation; transformers keeps
    hooks that record hidden states, which are unpacked when they are asked for."""
    module = str(getattr(hook, "__module__", ""))
    return module.startswith(("torch.distributed", "transformers.utils."))


@functools.cache
def warn_once(name, reason):
    warnings.warn(f"bert_fast leaves {name} to transformers in calls with {reason}", stacklevel=5)
