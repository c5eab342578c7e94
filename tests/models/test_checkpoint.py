"""Checkpoints: what Hugging Face wrote and reads, legacy names, and everything that is broken."""

import copy
import json
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bert_fast
from bert_fast.files import CheckpointError

SIZES = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 12,
}  # fmt: skip
IDS = torch.randint(1, 30, (2, 7))


@pytest.fixture
def theirs(tmp_path):
    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path)
    return model


def same(ours, theirs):
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS)[0], theirs(IDS)[0], rtol=1e-4, atol=1e-5)


def rewrite(tmp_path, change):
    """Applies change to the checkpoint's state dict."""
    path = tmp_path / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def load(tmp_path):
    return bert_fast.BertModel.from_pretrained(tmp_path)


def test_both_ways(tmp_path, theirs):
    ours = load(tmp_path)
    assert not ours.training
    same(ours, theirs)
    ours.save_pretrained(tmp_path / "again")
    back = transformers.BertModel.from_pretrained(tmp_path / "again").eval()
    for name, parameter in theirs.state_dict().items():
        assert torch.equal(parameter, back.state_dict()[name]), name
    same(load(tmp_path / "again"), theirs)


def test_prefix_legacy_names_and_bin(tmp_path, theirs):
    def legacy(state):
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        out = {}
        for key, value in state.items():
            for new, old in names.items():
                key = key.replace(new, old)
            out["bert." + key] = value
        return out | {"cls.predictions.bias": torch.zeros(30)}

    state = legacy(load_file(tmp_path / "model.safetensors"))
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    same(load(tmp_path), theirs)


def test_shards_and_dtype(tmp_path, theirs):
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    same(load(tmp_path / "shards"), theirs)
    low = bert_fast.BertModel.from_pretrained(tmp_path, torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


def test_without_pooler(tmp_path, theirs):
    rewrite(tmp_path, lambda s: {k: v for k, v in s.items() if "pooler" not in k})
    assert load(tmp_path)(IDS).pooler_output is None


def test_unexpected_keys_are_named(tmp_path, theirs):
    rewrite(tmp_path, lambda s: s | {"encoder.extra": torch.zeros(1)})
    with pytest.warns(UserWarning, match=r"unexpected, not loaded: encoder\.extra"):
        load(tmp_path)


def test_missing_and_misshapen_keys_are_named(tmp_path, theirs):
    name = "encoder.layer.1.attention.self.key.weight"
    rewrite(tmp_path, lambda s: {k: v for k, v in s.items() if k != name})
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        load(tmp_path)
    rewrite(tmp_path, lambda s: s | {name: torch.zeros(16, 15)})
    with pytest.raises(CheckpointError, match=rf"{name} is \(16, 15\), not \(16, 16\)"):
        load(tmp_path)


def test_broken_files(tmp_path, theirs):
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:-100], whole[:4], b"", b"\xff" * 200):
        weights.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt"):
            load(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load(tmp_path)
    for broken in (b"", b"PK\x03\x04 no archive", b"\x80\x02}q"):
        (tmp_path / "pytorch_model.bin").write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            load(tmp_path)


class Exploit:
    def __reduce__(self):
        return print, ("code from a checkpoint was executed",)


def test_pickled_code_is_not_run(tmp_path, theirs, capsys):
    (tmp_path / "model.safetensors").unlink()
    torch.save({"weight": Exploit()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled code"):
        load(tmp_path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"position_embedding_type": "relative_key"}, "relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "relu"}, "hidden_act must be one of"),
        ({"num_attention_heads": 3}, "not a multiple of"),
        ({"hidden_size": "wide"}, "hidden_size must be a positive integer"),
    ],
)
def test_other_architectures(tmp_path, theirs, change, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a JSON file"):
        load(tmp_path)


def test_failed_save_leaves_the_old_file(tmp_path, theirs, monkeypatch):
    ours, before = load(tmp_path), (tmp_path / "model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        ours.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".model*"))


def rename(directory, change):
    """The checkpoint with its weights changed by ``change(state dict)``, which is returned."""
    path = directory / "model.safetensors"
    save_file({k: v.clone() for k, v in change(load_file(path)).items()}, path)


WRAPPED = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "parallel": lambda key: f"module.{key}",
    "both": lambda key: f"module._orig_mod.{key}",
    "other way round": lambda key: f"_orig_mod.module.{key}",
    "layers compiled": lambda key: key.replace(".layer.0.", ".layer.0._orig_mod."),
    "sharded": lambda key: "_fsdp_wrapped_module."
    + key.replace(".layer.1.", ".layer.1._fsdp_wrapped_module."),
    "checkpointed": lambda key: key.replace(".layer.1.", ".layer.1._checkpoint_wrapped_module."),
    "a head's": lambda key: f"bert.{key}",
}  # fmt: skip


@pytest.mark.parametrize("how", WRAPPED)
def test_what_wrapping_leaves_in_the_keys(tmp_path, theirs, how):
    theirs.save_pretrained(tmp_path)
    wanted = bert_fast.BertModel.from_pretrained(tmp_path).state_dict()
    rename(tmp_path, lambda state: {WRAPPED[how](k): v for k, v in state.items()})
    found = bert_fast.BertModel.from_pretrained(tmp_path).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_keys_that_two_names_share(tmp_path, theirs):
    theirs.save_pretrained(tmp_path)
    key = "embeddings.LayerNorm.weight"
    rename(tmp_path, lambda state: {**state, f"module.{key}": state[key] + 1})
    with pytest.raises(CheckpointError, match=f"holds {key} twice"):
        bert_fast.BertModel.from_pretrained(tmp_path)


def test_an_adapter_among_the_weights(tmp_path, theirs):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["query"])
    adapted = peft.get_peft_model(copy.deepcopy(theirs), config)
    theirs.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").unlink()
    torch.save(adapted.state_dict(), tmp_path / "whole" / "pytorch_model.bin")
    adapted.save_pretrained(tmp_path / "alone")
    for name in ("whole", "alone"):
        with pytest.raises(CheckpointError, match=r"merge_and_unload\(\)"):
            bert_fast.BertModel.from_pretrained(tmp_path / name)


def test_weights_that_are_no_plain_numbers(tmp_path, theirs):
    theirs.save_pretrained(tmp_path)
    key = "encoder.layer.0.output.dense.weight"
    for change in (
        lambda state: {**state, f"{key}.absmax": torch.ones(3)},
        lambda state: {**state, key: state[key].to(torch.int8)},
        lambda state: {**state, key.replace("weight", "weight_scale"): torch.ones(1)},
        lambda state: {**state, f"{key[:-6]}parametrizations.weight.original0": torch.ones(1)},
    ):  # fmt: skip
        theirs.save_pretrained(tmp_path)
        rename(tmp_path, change)
        with pytest.raises(CheckpointError, match=r"quantised or parametrised|hold torch.int8"):
            bert_fast.BertModel.from_pretrained(tmp_path)


def test_shards_of_pytorchs_own_format(tmp_path, theirs):
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names, parts = {}, sorted(state)
    for number, keys in enumerate((parts[::2], parts[1::2])):
        names |= dict.fromkeys(keys, f"pytorch_model-{number}.bin")
        torch.save({key: state[key] for key in keys}, tmp_path / f"pytorch_model-{number}.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    found = bert_fast.BertModel.from_pretrained(tmp_path)
    assert torch.equal(found.embeddings.word.weight, state["embeddings.word_embeddings.weight"])
    (tmp_path / "pytorch_model-1.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-1\.bin is missing"):
        bert_fast.BertModel.from_pretrained(tmp_path)


def test_names_from_the_hub(tmp_path, theirs, monkeypatch):
    """Out of huggingface_hub's cache, laid out as it lays it; nothing is fetched."""
    commit, other = "a" * 40, "b" * 40
    repository = tmp_path / "models--org--name"
    for revision in (commit, other):
        theirs.save_pretrained(repository / "snapshots" / revision)
        with torch.no_grad():
            theirs.embeddings.word_embeddings.weight.add_(1.0)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "refs" / "v2").write_text(other)
    options = {"cache_dir": tmp_path, "local_files_only": True}
    for revision, place in ((None, commit), ("v2", other), (other, other)):
        found = bert_fast.BertModel.from_pretrained("org/name", revision=revision, **options)
        wanted = bert_fast.BertModel.from_pretrained(repository / "snapshots" / place)
        assert torch.equal(found.embeddings.word.weight, wanted.embeddings.word.weight)
    classifier = bert_fast.BertForSequenceClassification
    with pytest.warns(UserWarning, match="newly initialised"):
        assert (
            classifier.from_pretrained("org/name", num_labels=3, **options).config.num_labels == 3
        )
    for name, message in (
        ("org/other", "no repository of that name in the Hugging Face cache"),
        ("a/b/c", "is no directory, nor a repository's name"),
        (tmp_path / "none", "is no directory, nor a repository's name"),
        ("org/na me", "is no directory, nor a repository's name"),
    ):
        with pytest.raises(CheckpointError, match=message):
            bert_fast.BertModel.from_pretrained(name, **options)


def test_an_untied_decoder(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    ids = torch.randint(1, 50, (2, 9))
    for tied in (False, True):
        config = transformers.BertConfig(**sizes, tie_word_embeddings=tied)
        for kind in ("BertForMaskedLM", "BertForPreTraining"):
            theirs = getattr(transformers, kind)(config).eval()
            with torch.no_grad():
                theirs.cls.predictions.decoder.weight.mul_(3.0)
                theirs.cls.predictions.bias.normal_()
            theirs.save_pretrained(tmp_path)
            ours = getattr(bert_fast, kind).from_pretrained(tmp_path)
            with torch.no_grad():
                wanted, found = theirs(ids), ours(ids)
            torch.testing.assert_close(
                found[1] if kind == "BertForMaskedLM" else found.prediction_logits,
                wanted[0], rtol=0, atol=2e-5,
            )  # fmt: skip
            ours.save_pretrained(tmp_path / "again")
            again = getattr(transformers, kind).from_pretrained(tmp_path / "again").eval()
            with torch.no_grad():
                torch.testing.assert_close(again(ids)[0], wanted[0], rtol=0, atol=1e-6)


def test_a_decoder_that_differs_from_what_it_is_tied_to(tmp_path):
    """transformers 5 takes the decoder's own, with a warning."""
    if transformers.__version__ < "5":
        pytest.skip("transformers 4 ties them whatever the file says")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    ids, head = torch.randint(1, 50, (2, 9)), "cls.predictions.decoder"
    for name, shape in ((f"{head}.weight", (50, 32)), (f"{head}.bias", (50,))):
        model.save_pretrained(tmp_path)
        rename(tmp_path, lambda state, n=name, s=shape: {**state, n: torch.randn(s)})
        theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ours = bert_fast.BertForMaskedLM.from_pretrained(tmp_path)
        assert len(said) == name.endswith("weight")
        with torch.no_grad():
            torch.testing.assert_close(ours(ids)[1], theirs(ids)[0], rtol=0, atol=2e-5)


def test_layers_that_this_model_has_not(tmp_path, theirs):
    for key in ("encoder.layer.0.adapters.down.weight", "encoder.layer.7.output.dense.weight"):
        theirs.save_pretrained(tmp_path)
        rename(tmp_path, lambda state, k=key: {**state, k: torch.ones(2)})
        with pytest.raises(CheckpointError, match=f"holds more than this BERT: {key}"):
            bert_fast.BertModel.from_pretrained(tmp_path)


def test_labels_of_every_kind(tmp_path):
    """In another order, missing, or of another number than the head."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    config = transformers.BertConfig(**sizes, num_labels=11)
    theirs = transformers.BertForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    path, ours = tmp_path / "config.json", bert_fast.BertForSequenceClassification
    values = json.loads(path.read_text())
    names = {str(i): f"name {i}" for i in range(11)}

    def load(**change):
        whole = {k: v for k, v in values.items() if k not in ("id2label", "label2id")} | change
        path.write_text(json.dumps(whole))
        return ours.from_pretrained(tmp_path)

    mixed = dict(sorted(names.items()))  # "10" comes before "2"
    assert list(load(id2label=mixed).config.id2label.items()) == [
        (i, f"name {i}") for i in range(11)
    ]
    assert load(label2id={v: int(k) for k, v in names.items()}).config.id2label[10] == "name 10"
    assert load().config.id2label == {i: f"LABEL_{i}" for i in range(11)}
    assert load(num_labels=11).config.num_labels == 11
    with pytest.raises(CheckpointError, match=r"has 11 labels, config\.json names 2; num_labels="):
        load(id2label={"0": "a", "1": "b"})
    with pytest.raises(CheckpointError, match="id2label must name 0 to 1"):
        load(id2label={"0": "a", "2": "b"})
    load(id2label=names)
    with pytest.warns(UserWarning, match="has 11 labels, not the 2 asked for"):
        load_two = ours.from_pretrained(tmp_path, num_labels=2, ignore_mismatched_sizes=True)
    assert load_two.config.num_labels == 2
    with pytest.warns(UserWarning, match="has 11 labels, not the 4 asked for"):
        model = ours.from_pretrained(tmp_path, num_labels=4)
    assert model.classifier.weight.shape[0] == model.config.num_labels == 4
    with pytest.raises(ValueError, match="num_labels is 3; id2label names 2"):
        ours.from_pretrained(tmp_path, num_labels=3, id2label={0: "a", 1: "b"})


def test_the_dtype_that_the_config_says(tmp_path, theirs):
    """It decides what is computed in, whatever the weights are kept in."""
    path = tmp_path / "config.json"
    for kept, said, options, wanted in (
        (torch.bfloat16, "float32", {}, torch.float32),
        (torch.float32, "bfloat16", {}, torch.bfloat16),
        (torch.float32, "float16", {}, torch.float32),
        (torch.float32, "float16", {"dtype": "auto"}, torch.float16),
        (torch.float32, "bfloat16", {"dtype": torch.float64}, torch.float64),
    ):
        rename(tmp_path, lambda state, k=kept: {n: v.to(k) for n, v in state.items()})
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": said}))
        model = bert_fast.BertModel.from_pretrained(tmp_path, **options)
        assert {p.dtype for p in model.parameters()} == {wanted}
