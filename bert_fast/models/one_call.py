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
        self.bound = None, None  # (state, encoder): replaced as one, for other threads

    def __reduce__(self):  # copies and pickles have other weights: they bind their own
        return OneCall, self.kinds

    def __call__(self, layers, x, packing, workspace):
        """The last layer's output, in x's memory; or None where the layers must run one by one:
        they are hooked, not prepacked, in training with dropout, or asked for another backend."""
        if not ops.runs_in_one_call(x) or _hooked(layers):
            return None
        if (state := _state(layers)) is None:
            return None
        bound, encoder = self.bound
        if bound != state:
            _, encoder = self.bound = state, self._bind(layers)
        if encoder is None or x.shape[0] < encoder.min_rows():
            return None
        return encoder.forward(x, packing.cu_seqlens, workspace)

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
            and not (layer.training and any(dropout))
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
    return are_all_watched() or any(
        is_watched(module)
        for layer in layers._modules.values()
        for module in (layer, *layer._modules.values())
    )


# Runs in every call, so by the dictionaries: a module's attributes take five times as long.
def _state(layers):
    """Changes whenever what was bound does: another module or parameter, other memory, a write
    that PyTorch has seen; training, dropout. None where writes are not seen: inference tensors."""
    state = []
    for layer in layers._modules.values():
        state += type(layer), layer.training
        for block in layer._modules.values():
            own = block.__dict__
            state += (
                type(block),
                own.get("dropout_p"),
                own.get("hidden_dropout_p"),
                own.get("approximate"),
                own.get("num_heads"),
                getattr(block, "causal", None),
            )
            for part in block._modules.values():
                state += part, type(part), part.__dict__.get("packed"), part.__dict__.get("eps")
                for parameter in part._parameters.values():
                    if parameter is not None:
                        if parameter.is_inference():
                            return None
                        state += parameter.data_ptr(), parameter._version
    return state
