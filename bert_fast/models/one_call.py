"""Inference on the CPU through all layers in one call: the same kernels, in the same order, to the
same bits as the layers one by one, without Python between them."""

import contextlib

import torch
from torch import Tensor, nn

from bert_fast import ops
from bert_fast.models.watch import are_all_watched, is_watched

# Copied by one thread in some 0.5 ms. Many more are worth OpenMP's start: their layers take long.
_MOST_IN_ONE_THREAD = 1 << 20


class OneCall:
    """What binds a model's layers, and notices when they are no longer what was bound."""

    def __init__(self):
        # (what says that it still is, encoder, (layers, state)): replaced as one, for other threads
        self.bound = _NOTHING

    def __reduce__(self):  # copies and pickles have other weights: they bind their own
        return OneCall, ()

    def __call__(self, layers, x, packing, workspace, describe, state=None):
        """The last layer's output, in x's memory; or None where the layers must run one by one:
        they are hooked, not prepacked, in training with dropout, or asked for another backend.
        ``describe(layer)`` gives a layer's :class:`~bert_fast.models.repeat.Plain`, or None;
        ``state`` is compared: what else the layers depend on."""
        if are_all_watched() or not ops.runs_in_one_call(x):
            return None
        watch, encoder, of = self.bound
        if watch is None or of[0] is not layers or of[1] != state or not watch.hold():
            is_packed = _is_packed(layers, describe)
            if not (is_packed or watch) or _hooked(layers):
                return None
            if not is_packed:
                self.forget()
                return None
            watch, encoder, _ = self.bound = self._bind(layers, describe, state)
        if encoder is None or x.shape[0] < encoder.min_rows():
            return None
        return encoder.forward(x, packing.cu_seqlens, workspace)

    def forget(self):
        """Keeps nothing alive of the layers that were bound."""
        self.bound = _NOTHING

    def around(self, numbers):
        """A context for what a model does before and after its layers with so many numbers. Where
        the layers run in one call, small steps are done without OpenMP's loops."""
        small = numbers <= _MOST_IN_ONE_THREAD
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not small:
            return contextlib.nullcontext()
        return ops.without_openmp() if self.bound[1] else contextlib.nullcontext()

    def _bind(self, layers, describe, state):
        if (watch := _watch(layers)) is None:  # before they are looked at
            return _NOTHING
        plain, encoder = list(map(describe, layers)), None
        if all(layer is not None and _is_like(layer.numbers, plain[0].numbers) for layer in plain):
            numbers = plain[0].numbers
            encoder = ops.bind_encoder(
                [layer.parts for layer in plain], numbers.num_heads, numbers.approximate
            )
        return watch, encoder, (layers, state)


_NOTHING = None, None, (None, None)


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


def _watch(layers):
    """What says whether all that is to be bound is as it is now: no other module, parameter or
    memory, no write that PyTorch has seen, no hook, no training. None where writes are not seen
    (inference tensors), or modules are not kept in dictionaries (TorchScript's)."""
    kinds, values, contents, tensors = [], [], [], []
    for module in layers.modules():
        own = module.__dict__
        names, read = _OF_A_LEAF, ("_parameters",)
        if own["_modules"]:
            names, read = _OF_A_MODULE, ("_modules", *_HOOKS)
        kinds.append((module, type(module)))
        values.extend((own, name, own.get(name)) for name in names)
        values.extend((own, name, own[name]) for name in _WHERE_THERE if name in own)
        contents.extend((own[name], list(own[name].values())) for name in read)
        for parameter in own["_parameters"].values():
            if parameter is None:
                continue
            if type(parameter) not in _PLAIN or parameter.is_inference():
                return None
            # What is not packed is read where it lies, whatever was written there.
            version = parameter._version if parameter.ndim > 1 else -1
            tensors.append((parameter, parameter.data_ptr(), version))
    return ops.unchanged(kinds, values, contents, tensors)
