"""``accelerate(dtype=...)``: the products of accelerated layers in fp32, bf16 or int8."""

import warnings

import torch
from torch import nn

from bert_fast import ops
from bert_fast.models.inference import (
    check_calibration,
    check_precision,
    drawn_inputs,
    pack,
)


def is_plain(linear):
    """Whether a product with its weight is all that a module does."""
    return (
        type(linear) is nn.Linear
        and linear.bias is not None
        and type(linear.weight) in (nn.Parameter, torch.Tensor)
        and linear.weight.is_floating_point()
    )


def check_arguments(model, dtype, calibration):
    """Before anything has changed."""
    if dtype is not None:
        check_calibration(check_precision(dtype), calibration)
        if model.training:
            raise ValueError("dtype is for inference: call model.eval() first")
        if (reason := ops.why_not_packed()) is not None:
            raise ValueError(f"dtype needs the cpu backend: {reason}")
    elif calibration is not None:
        raise ValueError("calibration is for dtype='int8'")


def pack_layers(model, layers, bases, dtype, calibration):
    """``layers``: (name, accelerated layer) of ``model``; ``bases``: the encoders in it, which
    calibration runs."""
    precision, products, others = check_precision(dtype), [], []
    for name, layer in layers:
        for path in layer._bert_fast.family.linears():
            linear = layer.get_submodule(path)
            if is_plain(linear):
                slot = _Slot(layer._bert_fast, path, linear.weight)
                products.append((f"{name}.{path}.weight", slot))
            else:
                others.append(f"{name}.{path}, a {type(linear).__name__}")
    if others:
        warnings.warn(
            f"accelerate(dtype={precision!r}): {len(others)} products are modules of their own and "
            f"compute as they do: {others[0]}{', ...' if len(others) > 1 else ''}",
            stacklevel=3,
        )
    for name, slot in products:
        if slot.weight.dtype != torch.float32 or slot.weight.device.type != "cpu":
            raise ValueError(
                f"dtype is for float32 models on the CPU; {name} is {slot.weight.dtype} on "
                f"{slot.weight.device}: from_pretrained(..., dtype=torch.float32) loads it so"
            )

    def calibrate():
        with torch.no_grad():  # not inference_mode: what the model keeps would be of it
            for base in bases:
                for inputs in drawn_inputs(base.config) if calibration is None else calibration:
                    base(**inputs)

    pack(products, precision, calibrate, model)


class _Slot:
    """A product of a layer, to be packed."""

    def __init__(self, settings, path, weight):
        self.settings, self.path, self.weight = settings, path, weight

    @property
    def packed(self):
        return self.settings.packed.get(self.path)

    @packed.setter
    def packed(self, packed):
        self.settings.packed[self.path] = packed
        self.settings.changed()
        if hasattr(packed, "precision"):
            self.settings.how[self.path] = packed.precision, packed.x_factor
