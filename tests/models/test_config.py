"""What config.json and from_pretrained's arguments ask for: obeyed as transformers obeys it, or
refused by name."""

import inspect
import json
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.activations import ACT2FN

import bert_fast
from bert_fast.embeddings.backbone import load_backbone
from bert_fast.files import CheckpointError
from bert_fast.models import arguments
from bert_fast.models.blocks import GELU_APPROXIMATE

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 20, "initializer_range": 0.2,
}  # fmt: skip


def saved(directory, kind="BertModel", **config):
    """transformers' own, in a directory."""
    model = getattr(transformers, kind)(transformers.BertConfig(**{**SIZES, **config})).eval()
    model.save_pretrained(directory)
    return model


def rewrite(directory, **change):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def same(found, wanted):
    """Outputs of two models: every tensor that there is, in the same order."""
    found = [t for t in _flat(found) if t is not None]
    wanted = [t for t in _flat(wanted.to_tuple()) if t is not None]
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-4 * max(1, theirs.abs().max()))


def _flat(values):
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value


@pytest.mark.parametrize("name", ACT2FN)
def test_every_activation_of_transformers(tmp_path, name):
    """Those that are GELU run on our kernels, in every way in; the others are refused by name."""
    ids = torch.randint(1, 60, (2, 9))
    if name not in GELU_APPROXIMATE:
        with pytest.raises(ValueError, match=f"hidden_act must be one of gelu, .*, not '{name}'"):
            bert_fast.BertConfig(hidden_act=name)
        theirs = saved(tmp_path, hidden_act=name)
        with pytest.raises(CheckpointError, match=f"hidden_act must be one of gelu, .*'{name}'"):
            bert_fast.BertModel.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"hidden_act is '{name}', not one of gelu"):
            bert_fast.accelerate(theirs)
        return
    x = 4 * torch.randn(1000, dtype=torch.float64)
    wanted = F.gelu(x, approximate=GELU_APPROXIMATE[name])
    torch.testing.assert_close(wanted, ACT2FN[name](x), rtol=0, atol=1e-9)
    theirs = saved(tmp_path, "BertForMaskedLM", hidden_act=name)
    with torch.no_grad():
        wanted = theirs(ids)
        same(bert_fast.BertForMaskedLM.from_pretrained(tmp_path)(ids), wanted)
        same(bert_fast.accelerate(theirs)(ids).to_tuple(), wanted)


SHAPES = {
    "vocab_size": 70, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 40, "max_position_embeddings": 30, "type_vocab_size": 3,
}  # fmt: skip
OTHERS = SHAPES | {
    "hidden_act": "gelu_new", "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.4,
    "initializer_range": 0.5, "layer_norm_eps": 1e-2, "pad_token_id": 3, "classifier_dropout": 0.6,
    "id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}, "bos_token_id": 5,
    "problem_type": "multi_label_classification", "eos_token_id": 6, "dtype": "float64",
    "transformers_version": "4.30.0", "architectures": ["BertForTokenClassification"],
    "chunk_size_feed_forward": 3, "_name_or_path": "elsewhere", "model_type": "roberta",
}  # fmt: skip
WRITTEN = transformers.BertConfig().to_dict()
REFUSED = ("add_cross_attention", "is_decoder", "model_type", "output_attentions", "return_dict")


@pytest.mark.parametrize("key", WRITTEN)
def test_every_key_that_transformers_writes(tmp_path, key):
    value = OTHERS[key] if key in OTHERS else not WRITTEN[key]
    assert value != WRITTEN[key]
    kind = "BertForSequenceClassification"
    saved(tmp_path, kind, **({key: value} if key in SHAPES else {}))
    rewrite(tmp_path, **{key: value})
    if key in REFUSED:
        with pytest.raises(CheckpointError, match=rf"config\.json: {key} "):
            bert_fast.BertForSequenceClassification.from_pretrained(tmp_path)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said to be passed over
        ours = bert_fast.BertForSequenceClassification.from_pretrained(tmp_path)
    theirs = getattr(transformers, kind).from_pretrained(tmp_path)
    ids, types = torch.randint(4, 60, (3, 9)), torch.randint(0, 2, (3, 9))
    ids[:, 5] = WRITTEN["pad_token_id"]  # whatever it is, among tokens it counts
    labels = torch.rand(3, 2) if key == "problem_type" else torch.randint(0, 2, (3,))
    with torch.no_grad():
        same(
            ours(ids, token_type_ids=types, labels=labels),
            theirs(ids, token_type_ids=types, labels=labels),
        )
    layer, inside = ours.bert.layers[0], theirs.bert.encoder.layer[0]
    assert ours.dropout.p == theirs.dropout.p
    assert ours.bert.embeddings.word.padding_idx == theirs.config.pad_token_id
    assert layer.attention.dropout_p == inside.attention.self.dropout.p
    assert layer.feed_forward.hidden_dropout_p == inside.output.dropout.p
    if key != "label2id":  # alone it names the labels here
        assert ours.config.id2label == theirs.config.id2label


@pytest.mark.parametrize(
    "change", [{"torchscript": True}, {"use_return_dict": False}, {"pruned_heads": {"0": [1]}}],
)  # fmt: skip
def test_keys_of_older_files(tmp_path, change):
    saved(tmp_path)
    rewrite(tmp_path, **change)
    with pytest.raises(CheckpointError, match=next(iter(change))):
        bert_fast.BertModel.from_pretrained(tmp_path)


def test_what_an_encoder_of_texts_does_not_ask(tmp_path):
    """How results are returned is nothing to a SentenceEncoder."""
    saved(tmp_path)
    ids = torch.randint(1, 60, (9,))
    load = load_backbone
    wanted = load(tmp_path)(ids, None, torch.tensor([0, 9], dtype=torch.int32), 9)
    rewrite(tmp_path, output_attentions=True, output_hidden_states=True, torchscript=True)
    found = load(tmp_path)(ids, None, torch.tensor([0, 9], dtype=torch.int32), 9)
    assert torch.equal(found, wanted)


def test_arguments_that_change_no_number(tmp_path):
    saved(tmp_path)
    load = bert_fast.BertModel.from_pretrained
    wanted = load(tmp_path).state_dict()
    given = dict.fromkeys(arguments.HARMLESS, True) | {
        name: values[0] for name, values in arguments.REFUSED.items() if values
    }  # fmt: skip
    given |= dict.fromkeys(arguments.REFUSED) | {"use_cache": False, "device_map": "auto"}
    for attention in arguments.ATTENTIONS:
        found = load(tmp_path, **given, attn_implementation=attention).state_dict()
        assert all(torch.equal(found[name].cpu(), wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", arguments.REFUSED)
def test_arguments_that_are_refused(tmp_path, name):
    saved(tmp_path)
    with pytest.raises(ValueError, match=f"from_pretrained: {name}= is not supported"):
        bert_fast.BertModel.from_pretrained(tmp_path, **{name: {"some": "thing"}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attn_implementation": "mine"}, "attn_implementation 'mine' is not known"),
        ({"device_map": {"embeddings": "cpu", "encoder": "meta"}}, "device_map must name one"),
        ({"device_map": "disk"}, "device_map 'disk' is not supported"),
        ({"hidden_sise": 3}, "neither an argument nor of a config: hidden_sise="),
        ({"subfolder": "none"}, "has no subfolder none"),
        ({"variant": "fp16"}, r"neither model\.fp16\.safetensors nor pytorch_model\.fp16\.bin"),
        ({"use_safetensors": False}, r"has neither pytorch_model\.bin"),
        ({"config": "config.json"}, "config must be a BertConfig, not a str"),
        ({"is_decoder": True}, "is_decoder is set"),
        ({"output_attentions": True}, "output_attentions True is not supported"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, given, message):
    saved(tmp_path)
    with pytest.raises(ValueError, match=message):
        bert_fast.BertModel.from_pretrained(tmp_path, **given)


def test_every_argument_of_transformers_is_known():
    function = transformers.PreTrainedModel.from_pretrained
    known = {field.name for field in arguments.fields(arguments.Arguments)}
    known |= arguments.HARMLESS | set(arguments.REFUSED) | {"attn_implementation"}
    named = set(re.findall(r"kwargs\.(?:pop|get)\(\"(\w+)\"", inspect.getsource(function)))
    named |= set(inspect.signature(function).parameters) - {
        "pretrained_model_name_or_path", "model_args", "kwargs",
    }  # fmt: skip
    assert "device_map" in named
    assert not named - known


def test_arguments_that_are_obeyed(tmp_path):
    """With the model that transformers makes of the same arguments."""
    saved(tmp_path / "in" / "here")
    model = saved(tmp_path)
    model.save_pretrained(tmp_path, variant="other")
    ids, types = torch.randint(1, 60, (2, 9)), torch.randint(0, 2, (2, 9))
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.normal_()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    gelu_new = transformers.BertConfig(**SIZES, hidden_act="gelu_new")
    for options in (
        {"subfolder": "here"},
        {"variant": "other"},
        {"use_safetensors": True},
        {"use_safetensors": False},
        {"torch_dtype": torch.float64},
        {"output_hidden_states": True},
        {"layer_norm_eps": 0.1},
        {"hidden_act": "gelu_new"},
        {"config": gelu_new},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"add_pooling_layer": False},
    ):
        place = tmp_path / "in" if "subfolder" in options else tmp_path
        theirs = transformers.BertModel.from_pretrained(place, **options).eval()
        ours = bert_fast.BertModel.from_pretrained(place, **options)
        with torch.no_grad():
            same(ours(ids, token_type_ids=types), theirs(ids, token_type_ids=types))
    ours = bert_fast.BertModel.from_pretrained(
        tmp_path, config=bert_fast.BertConfig(**SIZES, hidden_act="gelu_new")
    )
    theirs = transformers.BertModel.from_pretrained(tmp_path, config=gelu_new).eval()
    with torch.no_grad():
        same(ours(ids), theirs(ids))


def test_the_first_layers_alone(tmp_path):
    saved(tmp_path, "BertForMaskedLM", num_hidden_layers=3)
    ids = torch.randint(1, 60, (2, 9))
    for kind, count in (("BertModel", 1), ("BertForMaskedLM", 2)):
        theirs = getattr(transformers, kind).from_pretrained(tmp_path, num_hidden_layers=count)
        with pytest.warns(UserWarning, match=f"only its first {count} layers are used"):
            ours = getattr(bert_fast, kind).from_pretrained(tmp_path, num_hidden_layers=count)
        name = "last_hidden_state" if kind == "BertModel" else "logits"
        with torch.no_grad():
            found, wanted = getattr(ours(ids), name), getattr(theirs.eval()(ids), name)
        torch.testing.assert_close(found, wanted, rtol=0, atol=3e-4 * wanted.abs().max().item())
    with pytest.raises(CheckpointError, match=r"lacks encoder\.layer\.3\."):
        bert_fast.BertModel.from_pretrained(tmp_path, num_hidden_layers=4)
