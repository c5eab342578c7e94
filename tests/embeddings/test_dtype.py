"""``dtype=`` of SentenceEncoder and CrossEncoder on a CPU, and --dtype on the command line."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from checkpoints import SIZES, TEXTS, VOCABULARY, bert, cross_encoder, sentence_transformer
from sentence_transformers.models import Pooling

import bert_fast
from bert_fast import _C
from bert_fast.cli import main
from bert_fast.files import CheckpointError
from bert_fast.models.packed_file import PACKED_FILE

PAIRS = [("the film", text) for text in TEXTS if text]


def cosines(found, wanted):
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    return (found * wanted).sum(1) / lengths


@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16, "bfloat16", "int8"])
def test_sentence_encoder(dtype, tmp_path):
    _, directory = sentence_transformer(tmp_path, Pooling(32))
    wanted = bert_fast.SentenceEncoder(directory).encode(TEXTS)
    encoder = bert_fast.SentenceEncoder(directory, dtype=dtype)
    found = encoder.encode(TEXTS)
    assert found.dtype == np.float32
    assert encoder.model.served_in == str(dtype).removeprefix("torch.")
    assert cosines(found, wanted).min() > {"int8": 0.98}.get(dtype, 0.999)
    if dtype != "float32" or _C.linear_kind(0) != "amx":  # where few rows are rounded otherwise
        assert np.array_equal(encoder.encode(TEXTS[:1])[0], found[0])
    with pytest.raises(RuntimeError, match="packed this model for the CPU"):
        encoder.to("meta")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_cross_encoder(dtype, tmp_path):
    _, directory = cross_encoder(tmp_path)
    wanted = bert_fast.CrossEncoder(directory).predict(PAIRS)
    found = bert_fast.CrossEncoder(directory, dtype=dtype).predict(PAIRS)
    assert not np.array_equal(found, wanted)
    packed = bert_fast.CrossEncoder(directory)
    packed.model.for_inference(dtype)
    assert np.array_equal(found, packed.predict(PAIRS))


def test_calibrate_a_cross_encoder(tmp_path):
    _, directory = cross_encoder(tmp_path)
    ranker = bert_fast.CrossEncoder(directory, dtype="int8")
    wanted, before = bert_fast.CrossEncoder(directory).predict(PAIRS), ranker.predict(PAIRS)
    ranker.calibrate(TEXTS)
    assert not np.array_equal(ranker.predict(PAIRS), before)
    assert np.abs(ranker.predict(PAIRS) - wanted).max() < 0.2  # 0.07 was seen in 60 draws


def test_calibrate(tmp_path):
    _, directory = sentence_transformer(tmp_path, Pooling(32))
    encoder = bert_fast.SentenceEncoder(directory, dtype="int8")
    wanted, before = bert_fast.SentenceEncoder(directory).encode(TEXTS), encoder.encode(TEXTS)
    for nothing in ([], iter(())):
        with pytest.raises(ValueError, match="calibration needs texts"):
            encoder.calibrate(nothing)
    assert np.array_equal(encoder.encode(TEXTS), before)
    encoder.calibrate(TEXTS)
    assert not np.array_equal(encoder.encode(TEXTS), before)
    assert cosines(encoder.encode(TEXTS), wanted).min() > 0.98


def test_another_family(tmp_path):
    directory = tmp_path / "roberta"
    torch.manual_seed(torch.initial_seed())
    config = transformers.RobertaConfig(**{**SIZES, "max_position_embeddings": 20}, pad_token_id=0)
    transformers.RobertaModel(config).eval().save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    transformers.BertTokenizer(str(directory / "vocab.txt")).save_pretrained(directory)
    wanted = bert_fast.SentenceEncoder(directory).encode(TEXTS[:3])
    encoder = bert_fast.SentenceEncoder(directory, dtype="int8")
    found = encoder.encode(TEXTS[:3])
    assert not np.array_equal(found, wanted)
    assert cosines(found, wanted).min() > 0.98
    encoder.calibrate(TEXTS[:3])
    assert cosines(encoder.encode(TEXTS[:3]), wanted).min() > 0.98


def test_a_packed_directory(tmp_path):
    """A SentenceEncoder's directory whose weights are packed: no float ones are needed."""
    _, directory = sentence_transformer(tmp_path, Pooling(32))
    encoder = bert_fast.SentenceEncoder(directory, dtype="int8")
    packed = tmp_path / "packed"
    shutil.copytree(directory, packed, ignore=shutil.ignore_patterns("*.safetensors"))
    encoder.model.save_pretrained(packed)
    assert (packed / PACKED_FILE).is_file()
    for dtype in (None, "int8"):
        again = bert_fast.SentenceEncoder(packed, dtype=dtype)
        assert np.array_equal(again.encode(TEXTS), encoder.encode(TEXTS))
    with pytest.raises(CheckpointError, match="packed in int8: it cannot be had in bfloat16"):
        bert_fast.SentenceEncoder(packed, dtype="bfloat16")
    with pytest.raises(ValueError, match="packed in int8 already"):
        again.calibrate(TEXTS)


def test_int8_is_for_the_cpu(tmp_path):
    with pytest.raises(ValueError, match="dtype 'int8' is for the CPU, not for cuda"):
        bert_fast.SentenceEncoder(bert(tmp_path / "bert"), dtype="int8", device="cuda")


def test_command_line(tmp_path):
    kind = transformers.BertForSequenceClassification
    directory, text = bert(tmp_path / "bert"), tmp_path / "texts.txt"
    text.write_text("the film\ngood plot\n", encoding="utf-8")
    out = tmp_path / "out.npy"
    options = ["--model", str(directory), "--text", str(text), "--out", str(out)]
    assert main(["embed", *options, "--device", "cpu", "--dtype", "int8"]) == 0
    wanted = bert_fast.SentenceEncoder(directory, dtype="int8").encode(["the film", "good plot"])
    assert np.array_equal(np.load(out), wanted)

    ranker, ranked = bert(tmp_path / "ranker", kind=kind, num_labels=1), tmp_path / "ranked.jsonl"
    options = ["--model", str(ranker), "--text", str(text), "--out", str(ranked)]
    words = ["rerank", *options, "--query", "good?", "--device", "cpu", "--dtype", "int8"]
    assert main(words) == 0
    scores = bert_fast.CrossEncoder(ranker, dtype="int8").rank("good?", ["the film", "good plot"])
    found = [json.loads(row)["score"] for row in ranked.read_text().splitlines()]
    assert found == [pytest.approx(float(row["score"]), rel=1e-6) for row in scores]

    tuned = bert(tmp_path / "tuned", kind=kind, num_labels=3)
    found = {}
    for dtype in ("float32", "int8"):
        out = tmp_path / f"{dtype}.jsonl"
        options = ["--model", str(tuned), "--rows", str(text), "--out", str(out)]
        assert main(["predict", *options, "--device", "cpu", "--dtype", dtype]) == 0
        found[dtype] = [json.loads(row) for row in out.read_text().splitlines()]
    assert found["int8"] != found["float32"]
    assert [row["text"] for row in found["int8"]] == ["the film", "good plot"]
