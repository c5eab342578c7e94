"""Layers that are what their classes say (:class:`Plain`). On a GPU in inference the first of a
forward runs and the others of its kind repeat it, in this forward and in others of its shape; in
training each is one op; on a CPU packed ones run in one call (``one_call.py``)."""

import itertools
import weakref
from operator import attrgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_fast import ops
from bert_fast.models.blocks import Linear, product_adds_bias, two
from bert_fast.models.watch import are_all_watched, is_watched

_of_tensor = attrgetter("dtype", "shape", "device")
_PLAIN = frozenset({Tensor, nn.Parameter})


class Plain(NamedTuple):
    """A layer that is what its class says."""

    numbers: ops.Numbers
    packing: object  # None: the layer cannot be trained as one op
    project: object  # x -> q, k, v, each (total_tokens, num_heads, head_dim), with their biases
    qkv: list  # (weight, bias) of the product that makes q, k and v, or of one for each
    rest: list  # of: output product, norm, up, down, last norm
    parts: tuple  # [the products of qkv], and those of rest: modules, or View

    def is_packed(self):
        """Whether some product has a packed weight."""
        qkv, out, _, up, down, _ = self.parts
        return any(product.packed is not None for product in (*qkv, out, up, down))

    def kind(self):
        """What layers have in common of which one can repeat another; None where none can."""
        tensors = list(itertools.chain.from_iterable((*self.qkv, *self.rest)))
        if not _PLAIN.issuperset(map(type, tensors)) or any(self.numbers.dropout):
            return None  # also where there is none
        if self.is_packed():
            return None
        return self.numbers, list(map(_of_tensor, tensors)), list(map(Tensor.stride, tensors))

    def train(self, x, seeds):
        """The layer as one op; None where it cannot be. ``seeds``: an :class:`ops.Seeds`."""
        tensors = itertools.chain.from_iterable((*self.qkv, *self.rest))
        if self.packing is None or not _PLAIN.issuperset(map(type, tensors)) or self.is_packed():
            return None
        cu_seqlens, longest = self.packing.cu_seqlens, self.packing.max_seqlen
        return ops.training_layer(x, cu_seqlens, longest, self.numbers, self.qkv, self.rest, seeds)


# Of a model's layers, {what else the launches depend on: (the layer's kind, Repeat)}.
_kept: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
MOST_KEPT = 128  # of a model: some 10 KB each


class Layers:
    """The layers of one forward, called one by one. ``describe(layer, *args)`` gives a layer's
    :class:`Plain`, or None; ``layers``: the module that holds them."""

    def __init__(self, describe, layers, x, packing):
        self.describe, self.offsets = describe, packing.cu_seqlens
        fast = product_adds_bias(x) and not torch.compiler.is_compiling()
        self.fast, self.trains = fast, fast and torch.is_grad_enabled()
        self.repeats = fast and len(layers) > 1 and ops.can_repeat(x)
        self.seeds = ops.Seeds(len(layers))
        self.kind = self.first = self.shape = self.shared = None
        if self.repeats:
            self.shape = ops.circumstances(x, self.offsets, packing.max_seqlen, packing.padded_tail)
            self.kept = _kept.setdefault(layers, {})

    def __call__(self, layer, x, *args):
        """layer(x, *args)"""
        if not self.fast or type(x) is not Tensor or not x.is_contiguous():
            return layer(x, *args)
        if (plain := self.describe(layer, *args)) is None:
            return layer(x, *args)
        if self.trains or any(plain.numbers.dropout):  # of which a seed makes the same either way
            return layer(x, *args) if (out := plain.train(x, self.seeds)) is None else out
        if not self.repeats or (kind := plain.kind()) is None:
            return layer(x, *args)
        kind = kind, _of_tensor(x)
        if self.kind is None:
            self.kind = kind
            if plain.packing is None:
                self.shape = None  # a position bias is not looked at here: it may be another
            known, first = self.kept.get(self.shape, (None, None))
            if known != kind:
                return self._run_first(layer, x, plain.rest, *args)
            self._repeat(first)
        if self.kind == kind:
            projected = plain.project(x)
            if self.first.fits(*projected):
                return self.first(x, *projected, self.shared, plain.rest)
            self.kept.pop(self.shape, None)  # such a model's layers are other ones now
        return layer(x, *args)

    def _run_first(self, layer, x, rest, *args):
        with ops.launches() as launches:
            out = layer(x, *args)
        first = ops.Repeat.of(launches, x, self.offsets, rest, out)
        self.repeats = first is not None
        if first is not None:
            self._repeat(first)
            if self.shape is not None:
                for oldest in [*self.kept][: len(self.kept) - MOST_KEPT + 1]:
                    self.kept.pop(oldest, None)  # other threads do so, too
                self.kept[self.shape] = self.kind, first
        return out

    def _repeat(self, first):
        self.first, self.shared = first, first.shared(self.offsets)


def describer(*kinds):
    """Of BertModel's layers; ``kinds``: the classes of a layer, its attention and feed-forward."""
    forwards = [kind.forward for kind in kinds]

    def describe(layer, packing=None, workspace=None):
        parts = layer._modules
        modules = layer, parts.get("attention"), parts.get("feed_forward")
        if tuple(map(type, modules)) != kinds or [kind.forward for kind in kinds] != forwards:
            return None
        if are_all_watched() or any(map(is_watched, modules)):
            return None
        _, attention, feed_forward = modules
        own, inner = attention._modules, feed_forward._modules
        linears = own["qkv"], own["out"], inner["up"], inner["down"]
        norms = own["norm"], inner["norm"]
        if any(type(linear) is not Linear for linear in linears):
            return None
        if any(type(norm) is not nn.LayerNorm for norm in norms):
            return None
        dropout = (
            attention.dropout_p if attention.training else 0.0,
            attention.hidden_dropout_p if attention.training else 0.0,
            feed_forward.hidden_dropout_p if feed_forward.training else 0.0,
        )
        heads = attention.num_heads, attention.head_dim
        numbers = ops.Numbers(
            *heads, attention.causal, feed_forward.approximate, *(norm.eps for norm in norms),
            dropout,
        )  # fmt: skip
        weight, bias = qkv = two(linears[0])

        def project(x):
            return F.linear(x, weight, bias).view(len(x), 3, *heads).unbind(1)

        rest = linears[1], norms[0], linears[2], linears[3], norms[1]
        return Plain(numbers, packing, project, [qkv], list(map(two, rest)), ([linears[0]], *rest))

    return describe
