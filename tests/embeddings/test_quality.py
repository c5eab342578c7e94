"""What bfloat16 and int8 cost on real models and texts: MiniLM, and a classifier made of it."""

import json
import re

import numpy as np
import pytest

import bert_fast
from bert_fast.bench import data
from bert_fast.training.finetune import Settings, finetune
from bert_fast.training.tuned import Tuned

pytestmark = pytest.mark.full


def vectors(dtype, texts):
    return bert_fast.SentenceEncoder(data.minilm(), dtype=dtype).encode(texts, progress=False)


@pytest.fixture(scope="module")
def films():
    """Plots; texts to find them by (reviews, four reviews in one, sentences of the plot itself),
    and whose they are."""
    plots, texts, of = [], [], []
    for number, film in enumerate(data.films()):
        plots.append(film.plot[:600])
        fours = [" ".join(film.reviews[at : at + 4]) for at in range(0, len(film.reviews) - 3, 4)]
        sentences = [s for s in re.split(r"(?<=[.!?])\s+", film.plot) if len(s) > 40]
        found = film.reviews[:10] + fours + sentences
        texts += found
        of += [number] * len(found)
    return plots, texts, np.array(of)


@pytest.fixture(scope="module")
def exact(films):
    plots, texts, _ = films
    return vectors("float32", plots), vectors("float32", texts)


def ndcg(plots, texts, films):
    """nDCG at 10 of each text's search for its film's plot."""
    order = np.argsort(-(texts @ plots.T), axis=1, kind="stable")[:, :10]
    return (order == films[:, None]) @ (1 / np.log2(np.arange(2, 12)))


@pytest.mark.parametrize(
    ("dtype", "mean", "least"), [("bfloat16", 0.9998, 0.9995), ("int8", 0.999, 0.99)]
)
def test_minilm(films, exact, dtype, mean, least):
    """Texts whose plot is near no other's find it in any precision; of the others any rounding
    moves some up and some down, by so much that of 3,400 texts alone 99.7% of float32's nDCG can
    be told from less."""
    plots, texts, of = films
    found = vectors(dtype, plots), vectors(dtype, texts)
    cosines = np.concatenate([(a * b).sum(1) for a, b in zip(found, exact, strict=True)])
    assert cosines.mean() >= mean
    assert cosines.min() >= least
    before = ndcg(*exact, of)
    differences = ndcg(*found, of) - before
    chance = differences.std() / len(differences) ** 0.5  # one standard error
    print(dtype, differences.mean() / before.mean(), chance / before.mean())
    assert chance < 0.0025 * before.mean()  # or the bar would say nothing
    assert differences.mean() >= -0.003 * before.mean()


def test_classifier(tmp_path):
    """Fine-tuned for an epoch on reviews; judged on 6,050 of other films. A few rows lie so near
    the border that any rounding moves them, to either side alike: the bar is 99.7% of float32's
    accuracy, less one standard deviation of as many coins, a thousandth. (The training differs
    from one processor to the next.)"""
    rows = data.reviews()
    held_out = set(sorted({film for film, _, _ in rows})[::2])
    parts = {
        "train": [row for row in rows if row[0] not in held_out][::2][:2400],
        "test": [row for row in rows if row[0] in held_out],
    }
    for name, some in parts.items():
        lines = (json.dumps({"text": text, "label": label}) + "\n" for _, text, label in some)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    out = tmp_path / "out"
    finetune(
        Settings(
            task="sentiment", model=str(data.minilm()), train=str(tmp_path / "train.jsonl"),
            test=str(tmp_path / "test.jsonl"), out=str(out), epochs=1, lr=1e-4, seed=0,
            max_length=48, device="cpu",
        )
    )  # fmt: skip
    found, right = {}, None
    for dtype in ("float32", "bfloat16", "int8"):
        tuned = Tuned.from_pretrained(out, max_length=48, dtype=dtype)
        examples = tuned.task.read(tmp_path / "test.jsonl", labelled=True)
        right = np.array([example.label for example in examples])
        found[dtype] = np.array(
            [row["label"] for row in map(tuned.task.row, tuned.predict(examples))]
        )
    accuracy = {dtype: (labels == right).mean() for dtype, labels in found.items()}
    print(accuracy, {dtype: (labels == found["float32"]).mean() for dtype, labels in found.items()})
    assert accuracy["float32"] > 0.6
    assert (found["bfloat16"] == found["float32"]).mean() >= 0.995
    assert (found["int8"] == found["float32"]).mean() >= 0.98
    for dtype in ("bfloat16", "int8"):
        moved = (found[dtype] != found["float32"]).sum()
        chance = np.sqrt(moved) / len(right)
        assert chance < 0.0015 * accuracy["float32"]
        assert accuracy[dtype] >= 0.997 * accuracy["float32"] - chance
