"""What other libraries do to a model before or after ``accelerate``: it works, or transformers' own
code runs, and a warning says so. The right values are a copy's that was never accelerated."""

import copy

import pytest
import torch
import transformers
from small_models import batch, bert, check, other_norm, said, same
from torch import nn

import bert_fast


def lora(model, **options):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    targets = options.pop("target_modules", ["query", "value", "dense"])
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, **options)
    adapted = peft.get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:  # B begins as zero: an adapter that changes nothing
            # Products of about 0.1 beside weights of 0.2: larger ones saturate the softmax, and the
            # model itself then answers rounding with errors a hundred times as large.
            nn.init.normal_(parameter, std=0.1)
    return adapted


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_lora(attention, when, use_dora):
    torch.manual_seed(seed := torch.initial_seed() % 2**31)
    theirs = lora(plain := bert(), use_dora=use_dora)
    plain = copy.deepcopy(theirs.get_base_model())
    assert plain is not None
    ours = copy.deepcopy(theirs)
    if when == "before":  # accelerate first, then the adapter
        torch.manual_seed(seed)
        ours = lora(bert_fast.accelerate(bert()), use_dora=use_dora)
        ours.load_state_dict(theirs.state_dict())
    else:
        bert_fast.accelerate(ours)
    inputs = batch()
    check(theirs, ours, inputs)
    assert attention  # the adapter is computed, and fast
    with theirs.disable_adapter(), ours.disable_adapter(), torch.no_grad():
        same(ours(**inputs)[0], theirs(**inputs)[0], inputs["attention_mask"])
    with torch.no_grad():
        merged = ours.merge_and_unload()
        same(merged(**inputs)[0], theirs(**inputs)[0], inputs["attention_mask"])


@pytest.mark.parametrize("prepack", [False, True])
def test_lora_on_a_classifier_and_its_saved_head(attention, prepack):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    kind = transformers.BertForSequenceClassification
    theirs = lora(bert(kind, num_labels=3), modules_to_save=["classifier"], task_type="SEQ_CLS")
    nn.init.normal_(theirs.get_base_model().classifier.modules_to_save["default"].weight)
    ours = bert_fast.accelerate(copy.deepcopy(theirs), prepack=prepack)
    assert isinstance(ours, peft.PeftModel)
    check(theirs, ours)
    with torch.no_grad():
        same(ours(**(inputs := batch()))[0], theirs(**inputs)[0])
    assert attention


class Twice(nn.Module):
    def forward(self, weight):
        return 2.0 * weight


def parametrised(model):
    nn.utils.parametrize.register_parametrization(
        model.encoder.layer[0].attention.self.query, "weight", Twice()
    )


def weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.encoder.layer[1].intermediate.dense)


class Scaled(nn.Linear):
    def forward(self, x):
        return 3.0 * super().forward(x)


def subclass(model):
    model.encoder.layer[0].output.dense.__class__ = Scaled


def no_bias(model):
    model.encoder.layer[0].attention.self.key.bias = None


@pytest.mark.parametrize("change", [parametrised, weight_norm, subclass, no_bias])
@pytest.mark.parametrize("when", ["before", "after"])
def test_another_kind_of_linear_layer(attention, change, when):
    theirs = bert()
    ours = copy.deepcopy(theirs)
    if when == "after":
        bert_fast.accelerate(ours, prepack=True)
        with torch.no_grad():
            ours(**batch())
    attention.clear()
    for model in (theirs, ours):
        change(model)
    if when == "before":
        bert_fast.accelerate(ours, prepack=True)
    check(theirs, ours)
    with torch.no_grad():
        same(ours(**(inputs := batch()))[0], theirs(**inputs)[0], inputs["attention_mask"])
    assert attention


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_by_torch(attention):
    """torch's dynamic int8: modules that are no linear layers of torch.nn are left alone."""
    theirs = torch.ao.quantization.quantize_dynamic(bert(), {nn.Linear}, dtype=torch.qint8)
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    inputs = batch()
    with torch.no_grad():
        messages = said(lambda: ours(**inputs))
        same(ours(**inputs)[0], theirs(**inputs)[0], inputs["attention_mask"], atol=1e-6)
    assert len(messages) == 1
    assert "which is a Linear" in messages[0] or "which is a Quantized" in messages[0]
    assert not attention


class Doubled(nn.Module):
    def forward(self, x, *args, **kwargs):
        return 2.0 * x


def other_linear(model):
    model.encoder.layer[1].output.dense = nn.Sequential(
        model.encoder.layer[1].output.dense, Doubled()
    )


def other_attention(model):
    inner = model.encoder.layer[0].attention.self

    class Mine(type(inner)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            return (2.0 * out[0], *out[1:])

    inner.__class__ = Mine


def own_forward(model):
    dense = model.encoder.layer[0].intermediate.dense
    forward = dense.forward
    dense.forward = lambda x: 2.0 * forward(x)


@pytest.mark.parametrize("change", [other_norm, other_linear, other_attention, own_forward])
def test_modules_of_other_kinds(attention, change):
    """Put in after: transformers' code runs, and is said once."""
    theirs = bert()
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    for model in (theirs, ours):
        change(model)
    inputs = batch()
    messages = said(lambda: (ours(**inputs), ours(**inputs)))
    assert len(messages) == 1
    check(theirs, ours, inputs)
    assert not attention


PLACES = ["encoder", "encoder.layer.1", "encoder.layer.0.attention.self.query",
          "encoder.layer.0.intermediate.dense", "encoder.layer.1.output.LayerNorm"]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_hooks_see_what_they_saw(attention, place):
    theirs = bert()
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    inputs, seen = batch(), {}
    for name, model in (("theirs", theirs), ("ours", ours)):
        module, found = model.get_submodule(place), seen.setdefault(name, [])
        hooks = [
            module.register_forward_pre_hook(lambda m, args, f=found: f.append(args[0])),
            module.register_forward_hook(
                lambda m, args, out, f=found: f.append(out if torch.is_tensor(out) else out[0])
            ),
            module.register_full_backward_hook(lambda m, gi, go, f=found: f.append(go[0])),
        ]
        model(**inputs)[0].square().sum().backward()
        for hook in hooks:
            hook.remove()
    assert len(seen["ours"]) == len(seen["theirs"]) >= 2
    for found, wanted in zip(seen["ours"], seen["theirs"], strict=True):
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted)
    assert not attention
    with torch.no_grad():
        ours(**inputs)
    assert attention  # without them it is fast again


def test_hooks_on_all_modules(attention):
    ours, seen = bert_fast.accelerate(bert()), []
    hook = nn.modules.module.register_module_forward_hook(lambda m, *args: seen.append(m))
    ours(**batch())
    hook.remove()
    assert ours.encoder.layer[1].output.dense in seen
    assert not attention


def test_sharding_hooks_are_none_of_our_business(attention):
    ours = bert_fast.accelerate(bert())

    def gather(module, args):
        return None

    gather.__module__ = "torch.distributed.fsdp"
    ours.encoder.layer[0].register_forward_pre_hook(gather)
    ours(**batch())
    assert attention


def relu(model):
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.ReLU()


def own_norms(model):
    class Norm(nn.LayerNorm):
        def forward(self, x):
            return 2.0 * super().forward(x)

    for layer in model.encoder.layer:
        layer.output.LayerNorm.__class__ = Norm


def own_layers(model):
    class Mine(transformers.models.bert.modeling_bert.BertLayer):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            return (2.0 * out[0], *out[1:]) if isinstance(out, tuple) else 2.0 * out

    for layer in model.encoder.layer:
        layer.__class__ = Mine


def norms_without_weights(model):
    model.encoder.layer[0].output.LayerNorm = nn.LayerNorm(32, elementwise_affine=False)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [relu, own_norms, own_layers, norms_without_weights])
def test_modules_of_other_kinds_in_all_layers(attention, change, when):
    theirs = bert()
    ours = copy.deepcopy(theirs)
    change(theirs)
    if when == "after":
        bert_fast.accelerate(ours)
        if change is own_layers:  # a swap of layers between models
            ours.encoder.layer = copy.deepcopy(theirs.encoder.layer)
        else:
            change(ours)
    else:
        change(ours)
        bert_fast.accelerate(ours)
    check(theirs, ours)
    assert not attention


def test_a_decoder_or_an_attention_of_ones_own(attention):
    def mine(module, q, k, v, mask, **options):
        return (2.0 * v).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("mine", mine)
    theirs = bert()
    for when in ("before", "after"):
        ours = copy.deepcopy(theirs)
        given = copy.deepcopy(theirs)
        if when == "after":
            bert_fast.accelerate(ours)
        for model in (ours, given):
            model.set_attn_implementation("mine")
        if when == "before":
            bert_fast.accelerate(ours)
        inputs = batch()
        with torch.no_grad():
            same(ours(**inputs)[0], given(**inputs)[0], inputs["attention_mask"])
    assert not attention


def test_merged_into_packed_weights(attention):
    """peft merges through .data, which no version counter sees."""
    ours = bert_fast.accelerate(bert(), prepack=True)
    inputs = batch()
    with torch.no_grad():
        ours(**inputs)
        adapted = lora(ours)
        wanted = copy.deepcopy(adapted)(**inputs)[0]
        merged = adapted.merge_and_unload()
        same(merged(**inputs)[0], wanted, inputs["attention_mask"])
        merged.half().float()
        plain = bert_fast.restore(copy.deepcopy(merged))
        same(merged(**inputs)[0], plain(**inputs)[0], inputs["attention_mask"])
