"""What an accelerated layer computes with: its modules, found once, and the product of queries,
keys and values in one."""

from __future__ import annotations

import functools
import weakref
from operator import is_

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from bert_fast import ops
from bert_fast.hugging_face.precision import is_plain
from bert_fast.models.blocks import Called, View, two
from bert_fast.models.repeat import Plain
from bert_fast.models.watch import is_watched


class Parts:
    """The modules of a layer as it was when it was last looked at (``why_not_this_state``), and a
    product for each of its linear layers, made anew when a parameter is another."""

    def __init__(self, layer, family):
        at = layer.get_submodule
        self.paths = family.linears()
        self.linears = [at(path) for path in self.paths]
        self.attention_norm, self.norm = map(at, family.norms())
        self.attention_dropout = at(family.attention_dropout), at(family.attention_trains)
        self.out_dropout = None if family.out_dropout is None else (at(family.out_dropout),) * 2
        self.down_dropout = (at(family.down_dropout),) * 2
        self._made = (), ()  # the state, and the products that were made of it
        self._six = None  # the parameters of q, k and v, where they are no more than that
        self.forget()

    def forget(self):
        """The copy of q's, k's and v's weights and biases."""
        self._fused = None, None, None  # their state, weight and bias of the one product

    def products(self, settings):
        """Those of q, k, v, out, up and down."""
        now = [settings.state]
        for linear in self.linears:
            weight = linear._parameters.get("weight")
            if weight is None:  # another module; or a replica of DataParallel: looked at each time
                weight = linear if type(linear) is not nn.Linear else object()
            now += weight, linear._parameters.get("bias"), getattr(weight, "dtype", None)
        known, products = self._made
        if len(known) != len(now) or not all(map(is_, now, known)):
            products = [
                View(linear.weight, linear.bias, settings.packed.get(path))
                if is_plain(linear) else Called(linear)
                for path, linear in zip(self.paths, self.linears, strict=True)
            ]  # fmt: skip
            self._made = now, products
            self.forget()
            six = [t for p in products[:3] for t in p.parts()]
            plain = not torch.compiler.is_compiling() and all(
                type(t) is nn.Parameter and not t.is_inference() for t in six
            )
            self._six = six if plain else None
        return products

    def fused(self, x, where, keeps_copy):
        """x [Wq; Wk; Wv]ᵀ + [bq; bk; bv], in one product: where the three lie together in memory;
        and, with ``keeps_copy``, where nothing is learned of them by a copy that is kept until one
        of them is seen to change: written to (but through ``.data``), by an optimizer's step,
        replaced, put back into its place (peft merges through ``.data``), or the layer moved or set
        to training or not. None where neither is so. ``where``: of :func:`whereabouts`."""
        six = self._six
        if where is None or six is None:
            return None
        weights, biases = six[::2], six[1::2]
        beside = weights[1].data_ptr() - weights[0].data_ptr() == weights[0].nbytes
        if not (beside or keeps_copy):
            return None
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in six)
        if beside and lie_together(weights):
            as_one = Together.apply if learns else together
            bias = as_one(*biases) if lie_together(biases) else torch.cat(biases)
            return F.linear(x, as_one(*weights), bias)
        if learns or not keeps_copy:
            self.forget()
            return None
        places = [t.data_ptr() for t in six]
        state = [where, places, [t._version for t in six], [t.requires_grad for t in six]]
        known, weight, bias = self._fused
        if known != state:
            # Outside inference mode, for it is used in others; under autocast cast once.
            with torch.inference_mode(False), torch.no_grad():
                dtype = where[1] or weights[0].dtype
                weight, bias = (torch.cat(list(ts)).to(dtype) for ts in (weights, biases))
            self._fused = state, weight, bias
            _notice_what_is_put_back(self)
        return F.linear(x, weight, bias)


_kept: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # of a linear layer, its Parts


def _notice_what_is_put_back(parts):
    if not _kept:
        _said_to_torch()
    for linear in parts.linears[:3]:
        _kept[linear] = weakref.ref(parts)


@functools.cache
def _said_to_torch():
    """Once: torch tells of every module that becomes another's child, and of every step of an
    optimizer, of which fused ones write without a tensor's knowing."""

    def put_back(parent, name, child):
        if type(child) is nn.Linear and (found := _kept.get(child)) and (parts := found()):
            parts.forget()

    def stepped(optimizer, args, kwargs):
        for found in list(_kept.values()):
            if parts := found():
                parts.forget()

    nn.modules.module.register_module_module_registration_hook(put_back)
    register_optimizer_step_post_hook(stepped)


def probability(dropout):
    """Of (dropout, the module that says whether it drops)."""
    return dropout[0].p if dropout is not None and dropout[1].training else 0.0


def describe(layer, run):
    """An accelerated layer, for others to repeat; None where it is not plain."""
    parts, settings = run.parts_of(layer), layer._bert_fast
    products = parts.products(settings)
    norms = parts.attention_norm, parts.norm
    dropouts = parts.attention_dropout, parts.out_dropout, parts.down_dropout
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        return None  # transformers' own call keeps the layer's input alone
    if (
        is_watched(layer)
        or any(type(norm) is not nn.LayerNorm for norm in norms)
        or any(type(product) is not View for product in products)
    ):  # fmt: skip
        return None
    *qkv, out, up, down = products

    def project(x):
        tokens, heads = x.shape[0], (-1, settings.head_dim)
        if (fused := parts.fused(x, run.where, settings.prepacked)) is not None:
            return fused.view(tokens, 3, *heads).unbind(1)
        return [F.linear(x, *linear.parts()).view(tokens, *heads) for linear in qkv]

    rest = [out.parts(), two(norms[0]), up.parts(), down.parts(), two(norms[1])]
    num_heads = qkv[0].out_features // settings.head_dim
    numbers = ops.Numbers(
        num_heads, settings.head_dim, False, settings.approximate, *(norm.eps for norm in norms),
        tuple(map(probability, dropouts)),
    )  # fmt: skip
    packing = run.packing if run.position_bias is None else None  # the bias learns: op by op
    return Plain(
        numbers, packing, project, [linear.parts() for linear in qkv], rest,
        (qkv, out, norms[0], up, down, norms[1]),
    )  # fmt: skip


def whereabouts(x, captured):
    """(stream, dtype of autocast or None) of a call whose layers may keep copies of their weights;
    None where they may not: what is traced or captured must see weights change."""
    if captured or torch.compiler.is_compiling():
        return None
    device = x.device.type
    stream = torch.cuda.current_stream(x.device).cuda_stream if device == "cuda" else 0
    on = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return stream, torch.get_autocast_dtype(device) if on else None


def lie_together(tensors):
    """Whether tensors of one width follow one another in memory, as rows of one."""
    first, end = tensors[0], tensors[0].data_ptr()
    for t in tensors:
        if (
            t.data_ptr() != end
            or not t.is_contiguous()
            or t.dtype != first.dtype
            or t.shape[1:] != first.shape[1:]
            or t.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return False
        end += t.numel() * t.element_size()
    return True


def together(*tensors):
    """A view of tensors that lie together."""
    first, rows = tensors[0].detach(), sum(len(t) for t in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


class Together(torch.autograd.Function):
    """:func:`together`; its gradient is theirs, side by side."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.rows = [len(t) for t in tensors]
        return together(*tensors)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.split(ctx.rows)
