"""Inference on the CPU through all layers in one call: the same kernels, in the same order, to the
same bits as the layers one by one, without Python between them. And what stands before and after
the layers, by few calls: they find the caches full of weights, and each new one costs ten times
what it does elsewhere."""

import contextlib

import torch
from torch import nn

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

    def __init__(self, *kinds):
        self.kinds = kinds  # the classes of a layer, its attention, its feed-forward, embeddings
        self.forget()

    def __reduce__(self):  # copies and pickles have other weights: they bind their own
        return OneCall, self.kinds

    def __call__(self, layers, x, packing, workspace):
        """The last layer's output, in x's memory; or None where the layers must run one by one:
        they are hooked, not prepacked, in training with dropout, or asked for another backend."""
        encoder = self._encoder(layers) if ops.runs_in_one_call(x) else None
        if encoder is None or x.shape[0] < encoder.min_rows():
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
        _, encoder, of = self.bound
        if (encoder is None and of is parts["layers"]) or capacity is not None:
            return None
        if not ops.all_run_in_one_call(given):
            return None
        embeddings, encoder = self._embeddings(parts["embeddings"]), self._encoder(parts["layers"])
        limits = config.vocab_size, config.max_position_embeddings, config.type_vocab_size
        if embeddings is None or encoder is None or not ops.are_inside(ids, limits):
            return None
        packing = model._packing(input_ids, attention_mask, cu_seqlens, max_seqlen, None)
        index, packed = packing.index, cu_seqlens is not None
        rows = packing.batch * packing.seqlen if index is None else index.shape[0]
        if packing.padded_tail or rows < max(1, encoder.min_rows()):
            return None
        if position_ids is None:
            model.check_length(packing.max_seqlen if packed else packing.seqlen)
        offsets = packing.cu_seqlens.contiguous()
        x = embeddings.forward(
            ids, rows, offsets.shape[0] - 1, 0 if packed else packing.seqlen, offsets, index
        )
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
        if not packed.possible(weight) or offsets.shape[0] <= packed.min_rows():
            return None
        return packed.of_first(x, offsets, weight, bias)

    def forget(self):
        """Keeps nothing alive of what was bound."""
        # (what says that it still is, encoder, layers): replaced as one, for other threads
        self.bound = None, None, None
        self.bound_embeddings = None, None, None  # the same of them

    def around(self, numbers, copies=False):
        """A context for what a model does before and after its layers with so many numbers, or for
        copies of them alone. Where the layers run in one call, small steps are done without
        OpenMP's loops."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.bound[1] is None:
            return contextlib.nullcontext()
        small = (_MOST_IN_A_COPY if copies else 0) < numbers <= _MOST_IN_ONE_THREAD
        return ops.without_openmp() if small else contextlib.nullcontext()

    def _encoder(self, layers):
        if are_all_watched() or self.kinds[1].causal:
            return None
        watch, encoder, of = self.bound
        if of is not layers or not watch.hold():
            if _hooked(layers) or (watch := _watch(layers)) is None:
                return None
            _, encoder, _ = self.bound = watch, self._bind(layers), layers
        return encoder

    def _embeddings(self, embeddings):
        watch, bound, of = self.bound_embeddings
        if of is not embeddings or not watch.hold():
            kinds = [(name, type(part)) for name, part in embeddings._modules.items()]
            if type(embeddings) is not self.kinds[3] or kinds != _EMBEDDINGS:
                return None
            if (watch := _watch_embeddings(embeddings)) is None:
                return None
            bound = self._bind_embeddings(embeddings)
            self.bound_embeddings = watch, bound, embeddings
        return bound

    def _bind_embeddings(self, embeddings):
        *tables, norm, dropout = embeddings._modules.values()
        if is_watched(embeddings) or is_watched(dropout) or (dropout.training and dropout.p):
            return None
        return ops.bind_embeddings(tables, norm)

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
        if (type(layer), *map(type, children)) != self.kinds[:3]:
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


_EMBEDDINGS = [
    ("word", nn.Embedding), ("position", nn.Embedding), ("token_type", nn.Embedding),
    ("norm", nn.LayerNorm), ("dropout", nn.Dropout),
]  # fmt: skip
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
_OF_A_BLOCK = "dropout_p", "hidden_dropout_p", "approximate", "num_heads", "causal", "p"
_OF_A_PART = "_parameters", "packed", "eps"
_TENSORS = torch.Tensor, nn.Parameter


class _Looks:
    """What says whether all that is to be bound is as it is now: no other module, parameter or
    memory, no write that PyTorch has seen, no hook, no training."""

    def __init__(self):
        self.kinds, self.values, self.contents, self.tensors = [], [], [], []
        self.are_plain = True  # tensors of memory in which PyTorch sees writes

    def at(self, module, names, *parts):
        own = module.__dict__
        self.kinds.append((module, type(module)))
        self.values.extend((own, name, own.get(name)) for name in names)
        self.contents.extend((own[part], list(own[part].values())) for part in parts)

    def at_part(self, part):
        self.at(part, _OF_A_PART, "_parameters")
        for name, parameter in part._parameters.items():
            if parameter is not None:
                # What is not packed is read where it lies, whatever was written there.
                is_packed = name == "weight" and part.__dict__.get("packed")
                if type(parameter) not in _TENSORS or parameter.is_inference():
                    self.are_plain = False
                    return
                version = parameter._version if is_packed else -1
                self.tensors.append((parameter, parameter.data_ptr(), version))

    def through(self):
        """None where writes are not seen (inference tensors, tensors of other kinds), or modules
        are not kept in dictionaries (TorchScript's)."""
        if not self.are_plain or not all(isinstance(kept, dict) for kept, _ in self.contents):
            return None
        return ops.unchanged(self.kinds, self.values, self.contents, self.tensors)


def _watch(layers):
    looks = _Looks()
    looks.at(layers, ("_modules",), "_modules")
    for layer in layers._modules.values():
        looks.at(layer, _OF_A_MODULE, "_modules", *_HOOKS)
        for block in layer._modules.values():
            looks.at(block, (*_OF_A_MODULE, *_OF_A_BLOCK), "_modules", *_HOOKS)
            for part in block._modules.values():
                looks.at_part(part)
    return looks.through()


def _watch_embeddings(embeddings):
    looks = _Looks()
    looks.at(embeddings, _OF_A_MODULE, "_modules", *_HOOKS)
    for name, part in embeddings._modules.items():
        if name == "dropout":
            looks.at(part, (*_OF_A_MODULE, *_OF_A_BLOCK), *_HOOKS)
        else:
            looks.at_part(part)
    return looks.through()
