"""Inference on a GPU: the first layer of a forward runs, the others of its kind repeat it."""

import itertools
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
    """A layer that is what its class says, and can be repeated."""

    rules: tuple  # what it computes with beside its tensors
    project: object  # x -> q, k, v, each (total_tokens, num_heads, head_dim), with their biases
    rest: list  # (weight, bias) of: output product, norm, up, down, last norm
    others: tuple = ()  # the tensors that project reads

    def kind(self):
        """What layers have in common of which one can repeat another; None where none can."""
        tensors = [*self.others, *itertools.chain.from_iterable(self.rest)]
        if not _PLAIN.issuperset(map(type, tensors)):
            return None  # also where there is none
        return self.rules, list(map(_of_tensor, tensors)), list(map(Tensor.stride, tensors))


class Layers:
    """The layers of one forward, called one by one. ``describe(layer, *args)`` gives a layer's
    :class:`Plain`, or None."""

    def __init__(self, describe, count, x):
        self.describe = describe
        traced = torch.compiler.is_compiling()
        self.repeats = count > 1 and not traced and product_adds_bias(x) and ops.can_repeat(x)
        self.kind = self.first = None

    def __call__(self, layer, x, *args):
        """layer(x, *args)"""
        if not self.repeats or type(x) is not Tensor or not x.is_contiguous():
            return layer(x, *args)
        if (plain := self.describe(layer, *args)) is None:
            return layer(x, *args)
        if (kind := plain.kind()) is None:
            return layer(x, *args)
        if self.kind is None:
            with ops.launches() as launches:
                out = layer(x, *args)
            self.first = ops.Repeat.of(launches, x, plain.rest, out)
            self.repeats = self.first is not None
            self.kind = kind, _of_tensor(x)
            return out
        if self.kind == (kind, _of_tensor(x)):
            projected = plain.project(x)
            if self.first.fits(*projected):
                return self.first(x, *projected, plain.rest)
        return layer(x, *args)


def describer(*kinds):
    """Of BertModel's layers; ``kinds``: the classes of a layer, its attention and feed-forward."""
    forwards = [kind.forward for kind in kinds]

    def describe(layer, *args):
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
        if any(type(linear) is not Linear or linear.packed is not None for linear in linears):
            return None
        if any(type(norm) is not nn.LayerNorm for norm in norms):
            return None
        dropout = attention.dropout_p, attention.hidden_dropout_p, feed_forward.hidden_dropout_p
        if (attention.training or feed_forward.training) and any(dropout):
            return None
        heads = attention.num_heads, attention.head_dim
        rules = *heads, attention.causal, feed_forward.approximate, *(norm.eps for norm in norms)
        weight, bias = qkv = two(linears[0])

        def project(x):
            return F.linear(x, weight, bias).view(len(x), 3, *heads).unbind(1)

        rest = [linears[1], norms[0], linears[2], linears[3], norms[1]]
        return Plain(rules, project, list(map(two, rest)), qkv)

    return describe
