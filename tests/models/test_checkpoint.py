"""Checkpoints: what Hugging Face wrote and reads, legacy names, and everything that is broken."""

import json

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
