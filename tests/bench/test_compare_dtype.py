"""bert-fast compare --dtype: times beside cosines and recall, of what a cheaper format computes."""

import re

import pytest
import small_encoder
import torch
from sentence_transformers import SentenceTransformer

from bert_fast.bench import compare as comparison
from bert_fast.bench import quality
from bert_fast.cli import main

# Nothing here depends on how many there are.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def directory(tmp_path):
    return small_encoder.save(tmp_path / "model")


@pytest.fixture
def texts():
    numbers = torch.randint(len(small_encoder.WORDS), (16, 12)).tolist()
    return [
        " ".join(small_encoder.WORDS[i] for i in row[: 1 + n % 12]) for n, row in enumerate(numbers)
    ]


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 0.99), ("int8", 0.95)])
def test_a_cheaper_format_stands_beside_float32(directory, texts, dtype, least, capsys):
    rows, tokens = comparison.compare(directory, texts, rounds=1, dtype=dtype)
    assert [row.name for row in rows][-3:] == ["HF sdpa, sorted", "bert_fast", f"bert_fast {dtype}"]
    theirs = SentenceTransformer(str(directory), device="cpu").encode(texts)
    exact, cheap = (quality.cosines(row.embeddings, theirs) for row in rows[-2:])
    assert exact["least"] > 1 - 1e-6
    assert least < cheap["least"] < 1 - 1e-7
    comparison.report(rows, tokens)
    out = " ".join(capsys.readouterr().out.split())
    assert f"fp32 and {dtype}" in out
    figures = re.search(r"least: ([\d.]+) / ([\d.]+) / ([\d.]+)", out).groups()
    assert [float(f) for f in figures] == pytest.approx(list(cheap.values()), abs=1e-3)
    shared = quality.recall(rows[-1].embeddings, theirs)
    found = re.search(r"10 nearest neighbours: ([\d.]+)%", out)[1]
    assert float(found) / 100 == pytest.approx(shared, abs=0.07)


@pytest.mark.parametrize(
    ("dtype", "device", "message"),
    [("float8", "cpu", "--dtype must be one of"), ("int8", "cuda", "--dtype int8 is of the CPU")],
)
def test_other_dtypes_are_refused(dtype, device, message):
    with pytest.raises(ValueError, match=message):
        comparison.served("anywhere", dtype, device)


def test_a_single_text_has_no_neighbours(directory, tmp_path, capsys):
    path = tmp_path / "one.txt"
    path.write_text("good film", encoding="utf-8")
    assert main(["compare", "--model", str(directory), "--text", str(path), "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "Cosine to HF sdpa" in out
    assert "neighbours" not in out


def test_the_command_passes_its_dtype_on(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        comparison, "compare", lambda *args, **options: asked.append(options) or ([], 0)
    )
    monkeypatch.setattr(comparison, "report", lambda *args: None)
    (tmp_path / "t.txt").write_text("good film", encoding="utf-8")
    args = ["compare", "--model", "m", "--text", str(tmp_path / "t.txt")]
    assert main([*args, "--dtype", "bfloat16"]) == main(args) == 0
    assert [options["dtype"] for options in asked] == ["bfloat16", "float32"]
