"""A stack of encoder layers in one call, for inference with packed weights on the CPU."""

import torch

from bert_fast import backends
from bert_fast.ops.linear import can_use_packed

OPS = ("attention", "layer_norm", "gelu")


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


def runs_in_one_call(x):
    """Whether each op of a layer would choose the ``cpu`` backend for ``x``."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous():
        return False
    chosen = (backends.choose(op, "cpu", x.dtype, needs_grad=False) for op in OPS)
    return all(name == "cpu" for name in chosen)


def unchanged(*args):
    """A :class:`bert_fast.backends.cpu.Unchanged`."""
    return backends.module("cpu").Unchanged(*args)


def without_openmp():
    """A context in which torch's ops run in the calling thread alone, the ``cpu`` backend's as
    always."""
    return backends.module("cpu").WithoutOpenMP()


def _can_be_bound(part):
    for parameter in (part.weight, part.bias):
        if parameter is None or parameter.dtype != torch.float32 or not parameter.is_contiguous():
            return False
    if hasattr(part, "eps"):
        return part.weight.device.type == part.bias.device.type == "cpu"
    packed = part.packed
    plain = isinstance(packed, backends.module("cpu").PackedWeight)
    return plain and part.bias.device.type == "cpu" and can_use_packed(packed, part.weight)
