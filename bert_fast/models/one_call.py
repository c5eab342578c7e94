"""Inference on the CPU through all layers in one call: the same kernels, in the same order, to the
same bits as the layers one by one, without Python between them. And what stands before and after
the layers, by few calls: they find the caches full of weights, and each new one costs ten times
what it does elsewhere."""

import contextlib

import torch
from torch import Tensor, nn

from bert_fast import ops
from bert_fast.models.blocks import Linear
from bert_fast.models.watch import are_all_watched, is_watched

# Copied by one thread in some 0.5 ms. Many more are worth OpenMP's start: their layers take long.
_MOST_IN_ONE_THREAD = 1 << 20
# Copying these torch shares out to no thread (at::internal::GRAIN_SIZE); MKL, which does its
# products and its tanh, shares out fewer.
_MOST_IN_A_COPY = 1 << 15


class OneCall:
    """What binds a model's layers, and notices when they are no longer what was bound."""

    def __init__(self, embeddings=None):
        # The class of those that are computed beside the layers, and what it computes.
        self.of_embeddings, self.computed = embeddings, getattr(embeddings, "forward", None)
        self.forget()

    def __reduce__(self):  # copies and pickles have other weights: they bind their own
        return OneCall, (self.of_embeddings,)

    def __call__(self, layers, x, packing, workspace, describe, state=None):
        """The last layer's output, in x's memory; or None where the layers must run one by one:
        they are hooked, not prepacked, in training with dropout, or asked for another backend.
        ``describe(layer)`` gives a layer's :class:`~bert_fast.models.repeat.Plain`, or None;
        ``state`` is compared: what else the layers depend on."""
        encoder = self._encoder(layers, describe, state) if ops.runs_in_one_call(x) else None
        if encoder is None or x.shape[1] != encoder.hidden or not x.shape[0]:
            return None
        return encoder.forward(x, packing.cu_seqlens, workspace)

    def from_ids(
        self, model, input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens,
        max_seqlen, capacity,
    ):  # fmt: skip
        """What ``model.encode`` gives of its inputs, without the calls by which ``model._embed``
        checks and packs each of them. Or None where that has to be asked: also for an argument
        that it refuses."""
        ids = input_ids, position_ids, token_type_ids
        given, parts, config = (*ids, attention_mask, cu_seqlens), model._modules, model.config
        if capacity is not None or type(input_ids) is not Tensor or not input_ids.is_cpu:
            return None
        plain = all(t is None or type(t) is Tensor for t in given)
        if not plain or not ops.all_run_in_one_call(given):
            return None
        encoder = self._encoder(parts["layers"], model._describe)
        embeddings = encoder and self._embeddings(parts["embeddings"])
        limits = config.vocab_size, config.max_position_embeddings, config.type_vocab_size
        if embeddings is None or embeddings.hidden != encoder.hidden:
            return None
        if not ops.are_inside(ids, limits):
            return None
        packing = model._packing(input_ids, attention_mask, cu_seqlens, max_seqlen, None)
        index, packed = packing.index, cu_seqlens is not None
        rows = packing.batch * packing.seqlen if index is None else index.shape[0]
        if packing.padded_tail or rows < 1:
            return None
        if position_ids is None:
            model.check_length(packing.max_seqlen if packed else packing.seqlen)
        offsets = packing.cu_seqlens.contiguous()
        x = embeddings.forward(ids, rows, 0 if packed else packing.seqlen, offsets, index)
        return None if x is None else ([encoder.forward(x, offsets, model.workspace)], packing)

    def of_first(self, linear, x, packing):
        """``linear`` of each sequence's first token; or None where it has to be called."""
        packed = linear.__dict__.get("packed")
        if packed is None or packed.released or type(linear) is not Linear or is_watched(linear):
            return None
        plain = x.dtype == torch.float32 and x.is_cpu and x.is_contiguous()
        if not plain or are_all_watched() or not ops.all_run_in_one_call((x,)):
            return None
        (weight, bias), offsets = linear.parts(), packing.cu_seqlens.contiguous()
        fits = packed.possible(weight) and weight.shape == packed.shape == (len(weight), x.shape[1])
        if not fits or offsets.shape[0] <= 1:
            return None
        return packed.of_first(x, offsets, weight, bias)

    def forget(self):
        """Keeps nothing alive of what was bound."""
        # (what says that it still is, encoder, (layers, state)): replaced as one, for other threads
        self.bound = _NOTHING
        self.bound_embeddings = None, None, None  # of them, without a state

    def is_bound(self):
        """Whether layers ran in one call."""
        return self.bound[1] is not None

    def around(self, numbers, copies=False):
        """A context for what a model does before and after its layers with so many numbers, or for
        copies of them alone. Where the layers run in one call, small steps are done without
        OpenMP's loops."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not self.is_bound():
            return contextlib.nullcontext()
        small = (_MOST_IN_A_COPY if copies else 0) < numbers <= _MOST_IN_ONE_THREAD
        return ops.without_openmp() if small else contextlib.nullcontext()

    def _encoder(self, layers, describe, state=None):
        if are_all_watched():
            return None
        watch, encoder, of = self.bound
        if watch is None or of[0] is not layers or of[1] != state or not watch.hold():
            is_packed = _is_packed(layers, describe)
            if not (is_packed or watch) or _hooked(layers):
                return None
            if not is_packed:
                self.forget()
                return None
            watch, encoder, _ = self.bound = _bind(layers, describe, state)
        return encoder

    def _embeddings(self, embeddings):
        watch, bound, of = self.bound_embeddings
        if type(embeddings).forward is not self.computed:
            return None
        if of is not embeddings or not watch.hold():
            kinds = [(name, type(part)) for name, part in embeddings._modules.items()]
            if type(embeddings) is not self.of_embeddings or kinds != _EMBEDDINGS:
                return None
            if (watch := _watch(embeddings, embeddings._modules["dropout"])) is None:
                return None
            bound = _bind_embeddings(embeddings)
            self.bound_embeddings = watch, bound, embeddings
        return bound


_NOTHING = None, None, (None, None)
_EMBEDDINGS = [
    ("word", nn.Embedding), ("position", nn.Embedding), ("token_type", nn.Embedding),
    ("norm", nn.LayerNorm), ("dropout", nn.Dropout),
]  # fmt: skip


def _bind_embeddings(embeddings):
    *tables, norm, dropout = embeddings._modules.values()
    if is_watched(embeddings) or is_watched(dropout) or (dropout.training and dropout.p):
        return None
    return ops.bind_embeddings(tables, norm)


def _bind(layers, describe, state):
    if (watch := _watch(layers)) is None:  # before they are looked at
        return _NOTHING
    plain, encoder = list(map(describe, layers)), None
    if all(layer is not None and _is_like(layer.numbers, plain[0].numbers) for layer in plain):
        numbers = plain[0].numbers
        encoder = ops.bind_encoder(
            [layer.parts for layer in plain], numbers.num_heads, numbers.approximate
        )
    return watch, encoder, (layers, state)


def _is_packed(layers, describe):
    """Whether it is worth looking at all layers: by the first."""
    first = next(iter(layers._modules.values()), None) if type(layers) is nn.ModuleList else None
    plain = None if first is None else describe(first)
    return plain is not None and plain.is_packed()


def _is_like(numbers, first):
    same = (numbers.num_heads, numbers.approximate) == (first.num_heads, first.approximate)
    return same and not numbers.causal and not any(numbers.dropout)


def _hooked(layers):
    """Of leaves the weights are read, and nothing is called."""
    return any(is_watched(module) for module in layers.modules() if module._modules)


_HOOKS = "_forward_hooks", "_forward_pre_hooks"
# What modules have, or may be given.
_OF_A_MODULE = *_HOOKS, "forward", "_compiled_call_impl", "training", "_modules", "causal"
_OF_A_LEAF = "_parameters", "training", "packed"
_WHERE_THERE = "dropout_p", "hidden_dropout_p", "p", "approximate", "num_heads", "eps"
_PLAIN = Tensor, nn.Parameter


def _watch(root, *called):
    """What says whether all that is to be bound is as it is now: no other module, parameter or
    memory, no write that PyTorch has seen, no hook, no training; ``called``: leaves that are more
    than their weights. None where writes are not seen (inference tensors), or modules are not kept
    in dictionaries (TorchScript's)."""
    kinds, values, contents, tensors = [], [], [], []
    for module in root.modules():
        own = module.__dict__
        if "weight" in own or "bias" in own:  # of somebody who makes them anew in each call: pruned
            return None
        names, read = _OF_A_LEAF, ("_parameters",)
        if own["_modules"] or module in called:
            names, read = _OF_A_MODULE, ("_modules", *_HOOKS)
        kinds.append((module, type(module)))
        values.extend((own, name, own.get(name)) for name in names)
        values.extend((own, name, own[name]) for name in _WHERE_THERE if name in own)
        contents.extend((own[name], list(own[name].values())) for name in read)
        values.extend(
            (own[held], *named)
            for held in ("_modules", "_parameters")
            for named in own[held].items()
        )
        for parameter in own["_parameters"].values():
            if parameter is None:
                continue
            if type(parameter) not in _PLAIN or parameter.is_inference():
                return None
            # Vectors are not packed: they are read where they lie, whatever was written there.
            version = parameter._version if parameter.ndim > 1 else -1
            tensors.append((parameter, parameter.data_ptr(), version))
    return ops.unchanged(kinds, values, contents, tensors)
