"""A model laid out for inference on the CPU: its products in fp32, bf16 or int8, attention's own
in bf16 where these are bf16 or int8 (blocks.py, attention_precision), all else in fp32.

int8 follows LLM.int8()'s scales by row and column (Dettmers et al. 2022) and SmoothQuant (Xiao et
al. 2023): a channel of the input that is large in all texts takes the scale from the others, so it
is divided by a factor that its column of the weight is multiplied by. The factors come from
calibration inputs, and so does the choice of the products that stay in bf16.

On a GPU: products in float8 (float8.py).
"""

import warnings
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from bert_fast import ops
from bert_fast.models import float8
from bert_fast.models.blocks import Linear
from bert_fast.models.workspace import Workspace

Precision = Literal["float32", "bfloat16", "int8"]
Served = Literal["float32", "bfloat16", "int8", "float8"]  # of a BertModel alone

SMOOTHING = 0.5  # SmoothQuant's alpha: how much of a channel's size goes into the weight
ROWS = 512  # of a product's input that are kept to judge by
LIMIT = 0.02  # the relative error from which a product stays in bf16
_said: set[str] = set()


def check_precision(precision, known=Precision):
    """The name of a precision, given as one or as a torch.dtype."""
    name = str(precision).removeprefix("torch.").replace("float8_e4m3fn", "float8")
    if name not in get_args(known):
        raise ValueError(f"dtype must be one of {', '.join(get_args(known))}, not {precision!r}")
    return name


def check_calibration(precision, calibration):
    if calibration is not None and precision != "int8":
        raise ValueError(f"calibration is for int8, not for {precision}")


def _is_finite(weight):
    if weight.is_meta or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        return True  # elsewhere, or of somebody's own format: nothing can be said of it
    if not weight.numel():
        return True
    return all(torch.isfinite(end) for end in torch.aminmax(weight.detach()))


def check_finite(products, precision, model):
    # Also what is computed of parameters: by a parametrisation, by weight_norm.
    weights = [(name, product.weight) for name, product in products]
    for name, weight in [*weights, *model.named_parameters()]:
        if not _is_finite(weight):
            raise ValueError(f"{name} is not finite: in {precision} results would mean nothing")


def pack(products, precision, calibrate, model):
    """Lays products out for inference. If it fails, they are as they were.

    Args:
        products: (name, product) pairs; a product has ``weight`` and takes ``packed``.
        model: what the products are of.
        precision: "float32", "bfloat16" or "int8".
        calibrate: runs the model on calibration inputs; called for int8 alone.

    Raises:
        ValueError: a parameter is not finite, or calibration ran no tokens.
    """
    if precision != "float32":
        check_finite(products, precision, model)
    _say_where_slow(precision)
    if precision != "int8":
        for _, product in products:
            product.packed = ops.pack_weight(product.weight, precision)
        return
    chosen = [product.packed for _, product in products]
    try:
        for _, product in products:
            product.packed = Observer(product.weight)
        calibrate()
        chosen = [product.packed.choose(name) for name, product in products]
    finally:
        for (_, product), packed in zip(products, chosen, strict=True):
            product.packed = packed


def encoder_of(model):
    """The BertModel in a model with a head, or the model itself."""
    return getattr(model, "bert", model)


def for_inference(model, precision, calibration):
    """See :meth:`bert_fast.BertModel.for_inference`."""
    encoder, precision = encoder_of(model), check_precision(precision, Served)
    check_calibration(precision, calibration)
    weight = encoder.embeddings.word.weight
    if weight.is_inference():
        raise ValueError("for_inference cannot pack a model made in torch.inference_mode()")
    if encoder.served_in is not None:
        raise ValueError(
            f"for_inference was called before: the model is packed in {encoder.served_in}"
        )
    on_gpu = precision == "float8"
    if on_gpu:
        float8.check(encoder)
    elif weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(
            f"for_inference is for float32 models on the CPU, not {weight.dtype} on {weight.device}"
        )
    elif (reason := ops.why_not_packed()) is not None:
        raise ValueError(f"for_inference needs the cpu backend: {reason}")
    model.eval()
    products = [
        (f"layers.{name}.weight", module)
        for name, module in encoder.layers.named_modules()
        if isinstance(module, Linear)
    ]

    def calibrate():
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for inputs in drawn_inputs(encoder.config) if calibration is None else calibration:
                encoder.encode(**inputs)

    if on_gpu:
        check_finite(products, precision, model)
        float8.pack(products)
    else:
        pack(products, precision, calibrate, model)
    model.requires_grad_(False)
    for _, product in products:
        product.release()
    if not on_gpu:
        model.prepack()  # the pooler
    encoder.served_in = precision
    encoder.one_call.forget()
    return model


def drawn_inputs(config, texts=32, length=32):
    """Calibration without texts: sequences of drawn tokens. What is large in a channel is so in
    nearly all texts; MiniLM comes out as well as with 200 texts (docs/embeddings.md)."""
    generator = torch.Generator().manual_seed(0)
    # RoBERTa's positions begin after the padding's.
    usable = config.max_position_embeddings - (getattr(config, "pad_token_id", None) or 0) - 1
    shape = texts, max(1, min(length, usable))
    yield {"input_ids": torch.randint(config.vocab_size, shape, generator=generator)}


def _say_where_slow(precision):
    if precision in _said or ops.is_fast(precision):
        return
    _said.add(precision)
    warnings.warn(
        f"this processor has no instruction for products in {precision}: right, but not faster "
        "than float32",
        stacklevel=5,
    )


class Observer:
    """Stands in a packed weight's place, computes in fp32, and keeps what it sees of the input."""

    released = rounds = False

    def __init__(self, weight):
        self.weight, self.shape, self.greatest, self.rows = weight, weight.shape, None, []

    def possible(self, weight):
        return True

    def forward(self, x, weight, bias, approximate, out, workspace):
        if x.shape[0]:
            greatest = x.abs().amax(0)
            before = self.greatest
            self.greatest = greatest if before is None else torch.maximum(before, greatest)
            if (left := ROWS - sum(rows.shape[0] for rows in self.rows)) > 0:
                self.rows.append(x[:left].clone())
        torch.mm(x, weight.t(), out=out)
        if approximate is not None:
            return ops.gelu(out, bias, approximate=approximate, out=out)
        return out if bias is None else out.add_(bias)

    def choose(self, name):
        """The weight packed in int8, with or without the factors, or in bf16, by the error that
        each makes on the rows seen."""
        if self.greatest is None:
            raise ValueError(
                "calibration needs texts: no token was seen (are there hooks, or another backend?)"
            )
        if not torch.isfinite(self.greatest).all():
            raise ValueError(f"calibration: the input of {name} is not finite")
        x, weight = torch.cat(self.rows), self.weight.detach()
        exact = F.linear(x, weight)
        best, least = None, LIMIT
        for factor in (self._x_factor(weight), None):
            packed = ops.pack_weight(weight, "int8", factor)
            out = packed.forward(x, weight, None, None, torch.empty_like(exact), Workspace())
            error = (out - exact).norm() / exact.norm()
            if error < least:
                best, least = packed, error
        return best or ops.pack_weight(weight, "bfloat16" if ops.is_fast("bfloat16") else "float32")

    def _x_factor(self, weight):
        columns = weight.abs().amax(0)
        greatest = self.greatest.clamp(min=self.greatest.median())
        factor = columns.pow(1 - SMOOTHING) / greatest.pow(SMOOTHING)
        usable = (columns > 0) & (greatest > 0)
        return torch.where(usable, factor, 1.0).contiguous()
