"""What is not finite is not rounded to bfloat16 or int8: refused by its name."""

import pytest
import torch
import transformers
from test_inference import SIZES, drawn
from torch.nn.utils import parametrizations

import bert_fast


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    "name",
    ["layers.1.feed_forward.up.weight", "layers.0.attention.qkv.bias", "embeddings.word.weight",
     "layers.0.feed_forward.norm.weight", "pooler.bias"],
)  # fmt: skip
def test_what_is_not_finite_is_refused(precision, name):
    model = drawn()
    with torch.no_grad():
        model.get_parameter(name).flatten()[-1] = torch.nan if precision == "int8" else torch.inf
    with pytest.raises(ValueError, match=rf"{name} is not finite"):
        model.for_inference(precision)
    assert model.served_in is None


def test_what_parameters_give_is_looked_at():
    """A row of zeros by its length, which is 0: every parameter is finite, the weight is not."""
    model = drawn()
    linear = model.layers[0].attention.out
    with torch.no_grad():
        linear.weight[3] = 0
    parametrizations.weight_norm(linear)
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match=r"layers.0.attention.out.weight is not finite"):
        model.for_inference("int8")


def test_accelerate_refuses_what_is_not_finite():
    """Of the whole model, its head among it."""
    for name in ("bert.encoder.layer.1.output.LayerNorm.bias", "classifier.weight"):
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()
        with torch.no_grad():
            model.get_parameter(name).flatten()[1] = torch.nan
        with pytest.raises(ValueError, match=rf"{name} is not finite"):
            bert_fast.accelerate(model, dtype="int8")


def test_calibration_whose_activations_are_not_finite_is_refused():
    model = drawn()
    with torch.no_grad():
        model.layers[0].feed_forward.norm.weight.mul_(1e38).mul_(1e1)  # finite, times more is not
        model.layers[0].feed_forward.norm.weight.clamp_(-3e38, 3e38)
    with pytest.raises(ValueError, match=r"calibration: the input of layers.1.*is not finite"):
        model.for_inference("int8")
