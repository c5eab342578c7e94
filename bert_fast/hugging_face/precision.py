"""``accelerate(dtype=...)``: the products of accelerated layers in fp32, bf16 or int8."""

import torch
from torch import nn

from bert_fast import ops
from bert_fast.models.inference import check_precision, drawn_inputs, pack


def is_plain(linear):
    """Whether a product with its weight is all that a module does."""
    return (
        type(linear) is nn.Linear
        and linear.bias is not None
        and type(linear.weight) in (nn.Parameter, torch.Tensor)
        and linear.weight.is_floating_point()
    )


def pack_layers(layers, bases, dtype, calibration):
    """``layers``: (name, accelerated layer); ``bases``: the encoders that calibration runs."""
    precision = check_precision(dtype)
    if any(base.training for base in bases):
        raise ValueError("dtype is for inference: call model.eval() first")
    if (reason := ops.why_not_packed()) is not None:
        raise ValueError(f"dtype needs the cpu backend: {reason}")
    products = [
        (f"{name}.{path}.weight", _Slot(layer._bert_fast, path, layer.get_submodule(path).weight))
        for name, layer in layers
        for path in layer._bert_fast.family.linears()
        if is_plain(layer.get_submodule(path))
    ]
    for name, slot in products:
        if slot.weight.dtype != torch.float32 or slot.weight.device.type != "cpu":
            raise ValueError(
                f"dtype is for float32 models on the CPU; {name} is {slot.weight.dtype} on "
                f"{slot.weight.device}"
            )

    def calibrate():
        with torch.no_grad():  # not inference_mode: what the model keeps would be of it
            for base in bases:
                for inputs in drawn_inputs(base.config) if calibration is None else calibration:
                    base(**inputs)

    pack(products, precision, calibrate)


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
