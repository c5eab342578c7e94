"""Inference on the CPU through all layers in one call: the same kernels, in the same order, to the
same bits as the layers one by one, without Python between them."""

import contextlib

import torch
from torch import nn

from bert_fast import ops
from bert_fast.models.blocks import Linear
from bert_fast.models.watch import are_all_watched, is_watched

# Copied by one thread in some 0.5 ms. Many more are worth OpenMP's start: their layers take long.
_MOST_IN_ONE_THREAD = 1 << 20


class OneCall:
    """What binds a model's layers, and notices when they are no longer what was bound."""

    def __init__(self, *kinds):
        self.kinds = kinds  # the classes of a layer, its attention and its feed-forward
        # (what says that it still is, encoder, layers): replaced as one, for other threads
        self.bound = None, None, None

    def __reduce__(self):  # copies and pickles have other weights: they bind their own
        return OneCall, self.kinds

    def __call__(self, layers, x, packing, workspace):
        """The last layer's output, in x's memory; or None where the layers must run one by one:
        they are hooked, not prepacked, in training with dropout, or asked for another backend."""
        _, attention, _ = self.kinds
        if are_all_watched() or attention.causal or not ops.runs_in_one_call(x):
            return None
        watch, encoder, of = self.bound
        if of is not layers or not watch.hold():
            if _hooked(layers) or (watch := _watch(layers)) is None:
                return None
            _, encoder, _ = self.bound = watch, self._bind(layers), layers
        if encoder is None or x.shape[0] < encoder.min_rows():
            return None
        return encoder.forward(x, packing.cu_seqlens, workspace)

    def forget(self):
        """Keeps nothing alive of the layers that were bound."""
        self.bound = None, None, None

    def around(self, numbers):
        """A context for what a model does before and after its layers with so many numbers. Where
        the layers run in one call, small steps are done without OpenMP's loops."""
        small = numbers <= _MOST_IN_ONE_THREAD
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not small:
            return contextlib.nullcontext()
        return ops.without_openmp() if self.bound[1] else contextlib.nullcontext()

    def _bind(self, layers):
        first = next(iter(layers), None)
        if first is None or not all(self._is_plain(layer, first) for layer in layers):
            return None
        return ops.bind_encoder(
            [_products_and_norms(layer) for layer in layers],
            first.attention.num_heads, first.feed_forward.approximate,
        )  # fmt: skip

    def _is_plain(self, layer, first):
        children = layer._modules.get("attention"), layer._modules.get("feed_forward")
        if (type(layer), *map(type, children)) != self.kinds:
            return False
        attention, feed_forward = children
        dropout = (attention.dropout_p, attention.hidden_dropout_p, feed_forward.hidden_dropout_p)
        parts = zip(_products_and_norms(layer), _PARTS, strict=True)
        return (
            all(type(part) is kind for part, kind in parts)
            and not attention.causal
            and not (any(module.training for module in (layer, *children)) and any(dropout))
            and attention.num_heads == first.attention.num_heads
            and feed_forward.approximate == first.feed_forward.approximate
        )


_PARTS = (Linear, Linear, nn.LayerNorm, Linear, Linear, nn.LayerNorm)


def _products_and_norms(layer):
    attention, feed_forward = layer.attention, layer.feed_forward
    return (
        attention.qkv, attention.out, attention.norm,
        feed_forward.up, feed_forward.down, feed_forward.norm,
    )  # fmt: skip


def _hooked(layers):
    return any(
        is_watched(module)
        for layer in layers._modules.values()
        for module in (layer, *layer._modules.values())
    )


_HOOKS = "_forward_hooks", "_forward_pre_hooks"
_OF_A_MODULE = *_HOOKS, "forward", "_compiled_call_impl", "training", "_modules"
_OF_A_BLOCK = "dropout_p", "hidden_dropout_p", "approximate", "num_heads", "causal"
_OF_A_PART = "_parameters", "packed", "eps"


def _watch(layers):
    """What says whether all that is to be bound is as it is now: no other module, parameter or
    memory, no write that PyTorch has seen, no hook, no training. None where writes are not seen
    (inference tensors), or modules are not kept in dictionaries (TorchScript's)."""
    kinds, values, contents, tensors = [], [], [], []

    def look_at(module, names, *parts):
        own = module.__dict__
        kinds.append((module, type(module)))
        values.extend((own, name, own.get(name)) for name in names)
        contents.extend((own[part], list(own[part].values())) for part in parts)

    look_at(layers, ("_modules",), "_modules")
    for layer in layers._modules.values():
        look_at(layer, _OF_A_MODULE, "_modules", *_HOOKS)
        for block in layer._modules.values():
            look_at(block, (*_OF_A_MODULE, *_OF_A_BLOCK), "_modules", *_HOOKS)
            for part in block._modules.values():
                look_at(part, _OF_A_PART, "_parameters")
                for name, parameter in part._parameters.items():
                    if parameter is None:
                        continue
                    if parameter.is_inference():
                        return None
                    # What is not packed is read where it lies, whatever was written there.
                    is_packed = name == "weight" and part.__dict__.get("packed")
                    version = parameter._version if is_packed else -1
                    tensors.append((parameter, parameter.data_ptr(), version))
    if not all(isinstance(kept, dict) for kept, _ in contents):
        return None
    return ops.unchanged(kinds, values, contents, tensors)
