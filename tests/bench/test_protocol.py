"""bert-fast bench --protocol sentence-transformers: texts, backends, quality beside speed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import small_encoder
import torch
from sentence_transformers import SentenceTransformer

from bert_fast.bench import encoders, protocol
from bert_fast.bench.peers.peer import Absent
from bert_fast.cli import main

TEXTS = [" ".join(small_encoder.WORDS[: 1 + i]) for i in range(len(small_encoder.WORDS))]


# Nothing here depends on how many there are.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def directory(tmp_path):
    return small_encoder.save(tmp_path / "model")


def cosines(found, directory):
    exact = SentenceTransformer(str(directory), device="cpu").encode(TEXTS)
    return (found * exact).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(exact, axis=1)


@pytest.mark.parametrize("name", encoders.BACKENDS)
def test_every_backend_encodes_what_sentence_transformers_does(name, directory):
    """Batches of other shapes than it was traced by, in the order of the texts."""
    if (reason := encoders.absent(name)) is not None:
        pytest.skip(reason)
    try:
        encode = encoders.make(name, directory, TEXTS[:4])
    except Absent as reason:
        pytest.skip(str(reason))
    least = {"float32": 1 - 1e-5, "bfloat16": 0.99, "int8": 0.95}[name.rpartition(" ")[2]]
    for size in (1, 3, 16):
        found = encode(TEXTS, size)
        assert found.dtype == np.float32
        assert cosines(found, directory).min() > least


@pytest.mark.parametrize("length", protocol.TEXTS)
def test_texts_are_as_long_as_the_published_ones(length):
    made = protocol.texts(length, 200, seed=int(torch.randint(1000, ())))
    mean, deviation = protocol.TEXTS[length]
    # 5 standard errors; none under 8 characters, which raises Natural Questions' mean a little.
    assert np.mean([len(text) for text in made]) == pytest.approx(
        mean, abs=5 * deviation / 200**0.5 + 0.05 * mean
    )


def test_the_best_batch_size_counts():
    calls = []

    def encode(some, size):
        calls.append((len(some), size))
        for _ in range(20_000 if size == 4 else 2_000_000):
            pass

    assert protocol.best(encode, ["a"] * 8, (2, 4), seconds=0)[1] == 4
    assert calls == [(2, 2), (8, 2), (4, 4), (8, 4)]
    calls.clear()
    protocol.best(encode, ["a"] * 8, (4, 16, 32), seconds=0)
    assert calls == [(4, 4), (8, 4), (8, 8), (8, 8)]  # no size twice: there are no more texts


def test_a_short_measurement_is_repeated(monkeypatch):
    clock, taken = [0.0], iter([9.0, 0.4, 0.2, 0.5])  # to warm up, then of three calls the median

    def encode(some, size):
        clock[0] += next(taken)

    monkeypatch.setattr(protocol.time, "perf_counter", lambda: clock[0])
    assert protocol.best(encode, ["a"] * 8, (8,)) == (pytest.approx(8 / 0.4), 8)


def test_summary_is_the_median_over_models_and_texts():
    def row(model, backend, speedup, ndcg=None):
        found = {"model": model, "backend": backend, "speedup": speedup}
        cosine = {"mean": 0.99, "p1": 0.98, "least": 0.9}
        return found | ({"ndcg": ndcg, "cosine": cosine} if ndcg is not None else {})

    rows = [row("m", encoders.REFERENCE, 1.0, 0.8), row("drawn", encoders.REFERENCE, 1.0)]
    rows += [row("m", "x", 2.0, 0.72), row("m", "x", 3.0, 0.72), row("drawn", "x", 9.0)]
    rows += [{"model": "m", "backend": "y", "refused": "wrong"}]
    found = protocol.summary(rows)
    assert found.keys() == {encoders.REFERENCE, "x"}
    assert found["x"]["speedup"] == 3.0
    assert found["x"]["quality"] == pytest.approx(0.9)


@pytest.mark.parametrize("shape", protocol.SHAPES)
def test_shapes_are_drawn_with_the_tokenizer_of_another(shape, directory, tmp_path):
    kind, changes = protocol.SHAPES[shape]
    small = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 64}  # fmt: skip
    drawn = protocol.draw(tmp_path / shape, kind, changes | small, directory)
    theirs = SentenceTransformer(str(drawn), device="cpu")
    assert theirs[0].model.config.model_type == kind
    found = encoders.make("bert_fast float32", drawn, TEXTS)(TEXTS, 3)
    assert np.allclose(found, theirs.encode(TEXTS), atol=1e-5)


def test_the_command(directory, tmp_path, capsys, monkeypatch):
    out, plot = tmp_path / "r.json", tmp_path / "r.png"
    monkeypatch.setattr(protocol, "QUICK", replace(protocol.QUICK, batch_sizes=(1, 2)))
    args = ["bench", "--protocol", "sentence-transformers", "--quick", "--models", str(directory)]
    args += ["--peers", "bert_fast bfloat16", "--samples", "2"]
    args += ["--json", str(out), "--plot", str(plot)]
    assert main(args) == 0
    found = json.loads(out.read_text())
    assert found["environment"]["torch"] == torch.__version__
    assert [row["backend"] for row in found["results"]] == [
        encoders.REFERENCE,
        "bert_fast bfloat16",
    ]
    assert found["plan"]["samples"] == 2
    assert found["results"][0]["speedup"] == 1.0
    assert found["summary"][encoders.REFERENCE]["quality"] == 1.0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "nDCG@10 of float32's" in capsys.readouterr().out


def test_a_wrong_encoder_is_refused(directory, monkeypatch):
    right = protocol.make

    def wrong(name, *args):
        encode = right(encoders.REFERENCE, *args)
        return (
            encode
            if name == encoders.REFERENCE
            else lambda some, size: encode(some, size)[::-1] * 2
        )

    monkeypatch.setattr(protocol, "make", wrong)
    plan = replace(
        protocol.QUICK, models=(str(directory),), peers=("bert_fast float32",), samples=1
    )
    rows, _ = protocol.run(plan, lambda line: None)
    assert [row.get("refused", "")[:6] for row in rows] == ["", "wrong:"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "say what to measure"),
        (["--json", "x.json", "op"], "--json before 'op'"),
        (["--protocol", "sentence-transformers", "--samples", "0"], "--samples must be at least 1"),
        (["--samples", "0", "op"], "--samples before 'op'"),
        (["--protocol", "sentence-transformers", "train"], "--protocol before 'train'"),
        (["--protocol", "sentence-transformers", "--models", "gpt"], "--models: 'gpt' is neither"),
        (
            ["--protocol", "sentence-transformers", "--peers", "nobody"],
            "--peers: no backend is called",
        ),
    ],
)
def test_bad_options_end_in_one_line(args, message, capsys):
    assert main(["bench", *args]) == 1
    assert capsys.readouterr().err.strip().startswith(f"bert-fast bench: {message}")
