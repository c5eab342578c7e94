"""A stack of encoder layers in one call, for inference with packed weights on the CPU."""

from operator import is_
from typing import NamedTuple

import torch

from bert_fast import backends
from bert_fast.ops.library import is_unseen
from bert_fast.ops.linear import can_use_packed

OPS = ("attention", "layer_norm", "gelu")
ALL_OPS = (*OPS, "embedding_layer_norm")


def bind_encoder(layers, num_heads, approximate):
    """A :class:`bert_fast.backends.cpu.Encoder` of one layer or more, or None where some layer has
    not the float32 parameters and packed weights that it takes."""
    wide, hidden = layers[0][3].weight.shape
    shapes = [(hidden, hidden), (hidden,), (wide, hidden), (hidden, wide), (hidden,)]
    for qkv, *rest in layers:
        each = (3 // len(qkv) * hidden, hidden)
        for part, shape in zip((*qkv, *rest), (*[each] * len(qkv), *shapes), strict=True):
            if not _can_be_bound(part):
                return None
            if tuple(part.weight.shape) != shape or tuple(part.bias.shape) != shape[:1]:
                return None
    return backends.module("cpu").Encoder(layers, num_heads, approximate)


def bind_embeddings(tables, norm):
    """A :class:`bert_fast.backends.cpu.Embeddings` of the modules word, position and token type,
    and of a layer-norm; or None where they have not the float32 parameters that it takes."""
    weights, vectors = [table.weight for table in tables], (norm.weight, norm.bias)
    if not all(map(_is_plain, (*weights, *vectors))):
        return None
    hidden = weights[0].shape[-1:]
    fit = all(w.ndim == 2 and w.shape[1:] == hidden for w in weights)
    if not fit or any(vector.shape != hidden for vector in vectors):
        return None
    return backends.module("cpu").Embeddings(weights, norm)


def runs_in_one_call(x):
    """Whether each op of a layer would choose the ``cpu`` backend for ``x``."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous():
        return False
    return backends.all_choose("cpu", OPS, "cpu", torch.float32)


def all_run_in_one_call(given):
    """Whether the embeddings' and the layers' ops on these tensors (or None) may be one call, in
    inference: nobody looks on, and each would choose the ``cpu`` backend."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not torch._C._is_any_autocast_enabled()
        and is_unseen(given)
        and backends.all_choose("cpu", ALL_OPS, "cpu", torch.float32)
    )


def unchanged(kinds, values, contents, tensors):
    """A :class:`bert_fast.backends.cpu.Unchanged`, or what does the same without the extension.
    None where something is not kept in dictionaries, as TorchScript's modules are not."""
    if not all(isinstance(kept, dict) for kept, *_ in (*values, *contents)):
        return None
    found = kinds, values, contents, tensors
    if backends.why_unavailable("cpu") is None:
        return backends.module("cpu").Unchanged(*found)
    return _Unchanged(*found)


class _Unchanged(NamedTuple):
    kinds: list
    values: list
    contents: list
    tensors: list

    def hold(self):
        return (
            all(type(thing) is kind for thing, kind in self.kinds)
            and all(kept.get(name) is value for kept, name, value in self.values)
            and all(
                len(kept) == len(values) and all(map(is_, kept.values(), values))
                for kept, values in self.contents
            )
            and all(
                tensor.data_ptr() == address and version in (-1, tensor._version)
                for tensor, address, version in self.tensors
            )
        )


def without_openmp():
    """A context in which torch's ops run in the calling thread alone, the ``cpu`` backend's as
    always."""
    return backends.module("cpu").WithoutOpenMP()


def _can_be_bound(part):
    weight, is_norm = part.weight, hasattr(part, "eps")
    if not _is_plain(part.bias) or not (_is_plain(weight) if is_norm else _is_float32(weight)):
        return False
    if is_norm:
        return True
    packed = part.packed
    plain = isinstance(packed, backends.module("cpu").PackedWeight)
    return plain and can_use_packed(packed, weight)


def _is_float32(parameter):
    """Of whatever device: a packed weight's own may be gone."""
    there = parameter is not None
    return there and parameter.dtype == torch.float32 and parameter.is_contiguous()


def _is_plain(parameter):
    return _is_float32(parameter) and parameter.device.type == "cpu"
