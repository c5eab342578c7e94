"""Models in bfloat16 and int8: every peer's cosine to float32, the floors, what is refused."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score
from sklearn.neighbors import NearestNeighbors

from bert_fast import BertModel
from bert_fast.bench import command, quality, report, run, selection, works
from bert_fast.bench.contestant import Run
from bert_fast.bench.peers import InFloat32, Ours, peers
from bert_fast.bench.peers.hugging_face import HuggingFace
from bert_fast.cli import main
from bert_fast.extras import missing

SMALL = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 128}  # fmt: skip
BATCHES = ((5, 17, 9), (3, 8))
NAMES = {peer.name: peer for peer in peers("cpu")}


def model(dtype, **options):
    seed = int(torch.randint(1000, ()))
    return works.Model(dtype, batches=BATCHES, config_changes=SMALL, seed=seed, **options)


def measured(work, *who):
    return run.measure(work, list(who), rounds=1, blocks=1)


CHEAP = [
    ("OpenVINO", "bfloat16", "openvino"), ("HF sdpa", "bfloat16", "transformers"),
    ("ONNX Runtime", "int8", "onnxruntime"), ("OpenVINO", "int8", "nncf"),
    ("CTranslate2", "int8", "ctranslate2"), ("torch dynamic int8", "int8", "transformers"),
    ("bert_fast.accelerate", "bfloat16", "transformers"),
    ("bert_fast.accelerate", "int8", "transformers"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "package"), CHEAP)
def test_peers_in_cheaper_formats_are_near_float32_and_not_it(name, dtype, package):
    if (reason := missing(package)) is not None:
        pytest.skip(reason)
    row = measured(model(works.DTYPES[dtype]), NAMES[name])
    if "no bf16" in str(row["absent"]):
        pytest.skip(row["absent"][name])
    cosine = row["results"][name]["cosine"]
    mean, least, _ = quality.FLOORS[works.DTYPES[dtype]]
    assert mean < cosine["mean"] <= 1 - 1e-9, row
    assert least < cosine["least"] <= cosine["p1"] <= cosine["mean"]
    assert row["results"][name]["ms"] > 0


@pytest.mark.parametrize("dtype", works.LOW, ids=str)
def test_the_accelerated_model_multiplies_as_users_are_told_to_ask_for(dtype):
    pytest.importorskip("transformers")
    layers = NAMES["bert_fast.accelerate"].load(model(dtype)).encoder.layer
    packed = [p for layer in layers for p in layer._bert_fast.packed.values()]
    assert len(packed) == 2 * 6
    assert all(p.rounds for p in packed)
    assert next(layers.parameters()).dtype == torch.float32


class Faulty(HuggingFace):
    """Hugging Face's model with a fault, in a cheaper dtype."""

    def __init__(self, fault):
        super().__init__("sdpa")
        self.name, self.fault = "faulty", fault
        self.dtypes = works.LOW

    def load(self, work):
        model = super().load(work.in_dtype(torch.float32))
        if self.fault in ("query", "feed-forward"):
            for layer in model.encoder.layer:
                dense = {"query": layer.attention.output, "feed-forward": layer.output}[self.fault]
                dense.dense.weight.data.zero_()
        return model

    def model(self, work, inputs):
        right = super().model(work, inputs)
        faults = {
            "scale": lambda t: t * 1.2,
            "NaN": lambda t: torch.where(t == t.max(), math.nan, t),
            "one text": lambda t: torch.cat([t[:-4], t[-4:].flip(-1)]),
            "shape": lambda t: t[1:],
        }
        fault = faults.get(self.fault, lambda t: t)
        return Run(right.forward, lambda outputs: fault(right.packed(outputs)))


@pytest.mark.parametrize("dtype", works.LOW, ids=str)
@pytest.mark.parametrize("fault", ["query", "feed-forward", "scale", "NaN", "one text", "shape"])
def test_a_wrong_model_is_refused_in_cheaper_formats(dtype, fault):
    row = measured(model(dtype), Faulty(fault))
    assert row["results"]["faulty"].keys() == {"refused"}, row
    assert row["results"]["faulty"]["refused"].startswith("wrong: ")


@pytest.mark.parametrize("dtype", works.LOW, ids=str)
def test_the_same_model_without_a_fault_is_timed(dtype):
    result = measured(model(dtype), Faulty(""))["results"]["faulty"]
    assert "ms" in result
    assert result["cosine"]["least"] > 0.99999


def test_ours_in_int8_is_served(monkeypatch):
    work = model(torch.int8)
    row = measured(work, Ours())
    assert row["results"]["bert_fast"]["cosine"]["mean"] > 0.99
    asked = []

    def for_inference(self, dtype):
        asked.append(dtype)
        return self.eval().prepack()

    monkeypatch.setattr(BertModel, "for_inference", for_inference, raising=False)
    for dtype in works.LOW:
        assert "ms" in measured(work.in_dtype(dtype), Ours())["results"]["bert_fast"]
    assert asked == ["int8", "bfloat16"] or asked == ["bfloat16", "int8"]


def test_float32_stands_beside_cheaper_formats():
    who = [Ours(), NAMES["HF sdpa"], NAMES["HF eager"]]
    names = [peer.name for peer in selection.with_float32(who, model(torch.int8))]
    assert names == ["bert_fast", "HF sdpa", "HF eager", "bert_fast, float32", "HF sdpa, float32"]
    assert selection.with_float32(who, model(torch.float32)) == who
    work = model(torch.bfloat16)
    row = measured(work, Ours(), InFloat32(Ours()))
    exact, cheap = (
        row["results"][n]["cosine"]["least"] for n in ("bert_fast, float32", "bert_fast")
    )
    assert exact > 1 - 1e-9 > cheap


def test_calibration_is_drawn_apart_from_what_is_measured():
    work = model(torch.int8)
    assert not any(
        torch.equal(batch["input_ids"], other["input_ids"])
        for batch in work.calibration for other in work.padded_batches
    )  # fmt: skip
    assert 50 <= sum(len(batch["input_ids"]) for batch in work.calibration) <= works.CALIBRATION
    for batch in work.calibration:
        assert batch["input_ids"][batch["attention_mask"] == 0].eq(0).all()


def test_the_command_shows_the_cosines(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(works.MODELS, "small", SMALL)
    monkeypatch.setattr(command, "ceilings", lambda *args: {"copy GB/s": 1.0})
    out, lines = tmp_path / "r.json", tmp_path / "r.csv"
    args = ["bench", "model", "--models", "small", "--batch", "2", "--seqlen", "8", "--rounds", "1",
            "--dtype", "bfloat16", "--peers", "HF sdpa", "--quick"]  # fmt: skip
    assert main([*args, "--json", str(out), "--csv", str(lines)]) == 0
    assert " cosine " in capsys.readouterr().out
    (row,) = json.loads(out.read_text())["rows"]
    assert {"HF sdpa", "HF sdpa, float32", "bert_fast, float32"} <= row["results"].keys()
    with open(lines, encoding="utf-8", newline="") as file:
        table = {line["contestant"]: line for line in csv.DictReader(file)}
    cosine = row["results"]["HF sdpa"]["cosine"]
    assert [float(table["HF sdpa"][f"cosine_{name}"]) for name in cosine] == list(cosine.values())


@pytest.mark.parametrize("level", ["op", "layer", "train"])
def test_int8_is_of_whole_models(level, capsys):
    assert main(["bench", level, "--dtype", "int8"]) == 1
    assert "--dtype int8 is of whole models on the CPU" in capsys.readouterr().err


def test_a_missing_peer_names_the_command_that_brings_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    extra = 'pip install "bert_fast[bench]"'
    brings = {
        "ONNX Runtime": extra, "OpenVINO": extra, "CTranslate2": extra, "HF sdpa": "bert_fast[hf]",
        "torchao int8, compiled": "pip install torchao", "zentorch": "pip install zentorch",
    }  # fmt: skip
    for name, how in brings.items():
        assert how in NAMES[name].why_absent(model(torch.float32)), name
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nncf" else 1)
    assert "package nncf is not installed" in NAMES["OpenVINO"].why_absent(model(torch.int8))


def test_cosines_are_numpys():
    a, b = np.random.default_rng(int(torch.randint(9999, ()))).normal(size=(2, 300, 8))
    each = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    wanted = {"mean": each.mean(), "p1": np.percentile(each, 1), "least": each.min()}
    assert quality.cosines(a, b) == pytest.approx(wanted, abs=1e-12)
    assert quality.shown(wanted).count("/") == 2


def test_ndcg_is_sklearns():
    queries, documents = torch.randn(7, 16), torch.randn(40, 16)
    relevant = [set(torch.randperm(40)[: 1 + i].tolist()) for i in range(7)]
    unit = [torch.nn.functional.normalize(t, dim=1) for t in (queries, documents)]
    labels = np.array([[number in row for number in range(40)] for row in relevant], dtype=float)
    wanted = ndcg_score(labels, (unit[0] @ unit[1].T).numpy(), k=10)
    assert quality.ndcg(queries, documents, relevant) == pytest.approx(wanted, abs=1e-6)


def test_recall_of_neighbours():
    some, other = torch.randn(2, 30, 8)
    assert quality.recall(some, some * 3) == 1.0
    near = [
        NearestNeighbors(n_neighbors=5, metric="cosine").fit(t).kneighbors(return_distance=False)
        for t in (some, other)
    ]
    common = sum(len(set(a) & set(b)) for a, b in zip(*near, strict=True))
    assert quality.recall(some, other, k=5) == pytest.approx(common / 150)
    assert math.isnan(quality.recall(some[:1], some[:1]))
    with pytest.raises(ValueError, match="29 embeddings beside 30"):
        quality.recall(some[1:], some)


def test_versions_of_the_engines_are_in_the_environment():
    facts = report.environment()
    for package in report.PACKAGES:
        if missing(package.replace("-", "_")) is None:
            assert facts[package]
