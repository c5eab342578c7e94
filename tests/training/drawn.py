"""What the tests of fine-tuning share: a small drawn BERT, and drawn rows for each task."""

import functools
import json
import random
import string

import pytest
import torch

import bert_fast
from bert_fast.embeddings.tokenizer import load_tokenizer
from bert_fast.training.corpus import SPECIAL
from bert_fast.training.finetune import Settings

WORDS = ["anna", "bob", "fine", "poor", "film", "plot", "story", "music", "who", "played", "the"]
TASKS = ("classification", "multi-label", "regression", "ner", "qa", "translation")


@pytest.fixture(autouse=True)
def seeded(fresh_seed):
    """Rows are drawn by the seed that conftest prints."""
    random.seed(torch.initial_seed())


def checkpoint(directory, dropout=0.0):
    """A BERT of one layer, its vocabulary these words and all letters."""
    directory.mkdir(parents=True, exist_ok=True)
    letters = [f"##{letter}" for letter in string.ascii_lowercase]
    tokens = [*SPECIAL, *WORDS, *string.ascii_lowercase, *letters]
    (directory / "vocab.txt").write_text("\n".join(tokens) + "\n")
    load_tokenizer(directory).save(str(directory / "tokenizer.json"))
    config = bert_fast.BertConfig(
        vocab_size=len(tokens), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=40, initializer_range=0.2,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    bert_fast.BertModel(config).save_pretrained(directory)
    return directory


def words(least=1, most=7):
    return random.choices(WORDS, k=random.randint(least, most))


def row(task):
    text = " ".join(words())
    if task == "classification":
        return {"text": text, "label": random.choice("abc")}
    if task == "multi-label":
        return {"text": text, "labels": random.choices("abc", k=random.randint(0, 2))}
    if task == "regression":
        return {"text": text, "label": random.gauss(0, 1)}
    if task == "ner":
        some = words(most=20)
        return {"words": some, "tags": [random.choice(["O", "B-x", "I-x"]) for _ in some]}
    if task == "translation":
        return {"text": text, "target": " ".join(words())}
    context, answer = " ".join(words(20, 30)), random.choice(WORDS)
    begin = context.find(answer)
    answers = [{"text": answer, "answer_start": begin}] if begin >= 0 else []
    return {"context": context, "qas": [{"question": "who played", "answers": answers}]}


def rows(task, number):
    """Every label of a task is there, whatever is drawn."""
    found = [row(task) for _ in range(number)]
    if task == "classification":
        found[:3] = [{"text": "film", "label": label} for label in "abc"]
    if task == "ner":
        found[0] = {"words": ["film", "plot", "the"], "tags": ["O", "B-x", "I-x"]}
    if task == "multi-label":
        found[0]["labels"] = ["a", "b", "c"]
    return found


def write(path, task, some):
    """A file of rows; its name."""
    if task == "qa":
        path = path.with_suffix(".json")
        path.write_text(json.dumps({"data": [{"paragraphs": some}]}))
    else:
        path = path.with_suffix(".jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return str(path)


def settings(task, folder, **changes):
    """Of a short run in ``folder``, which gets a checkpoint and rows where it has none."""
    if not (folder / "bert").exists():
        checkpoint(folder / "bert", changes.pop("dropout", 0.0))
    suffix = ".json" if task == "qa" else ".jsonl"
    for name, number in (("train", 30), ("test", 8)):
        path = folder / f"{name}-{task}{suffix}"
        if not path.exists():
            write(path, task, rows(task, number))
        changes.setdefault(name, str(path))
    short = {
        "epochs": 3, "lr": 1e-3, "batch_tokens": 120, "max_length": 24, "decoder_layers": 1,
        "target_vocab": 300, "beams": 1, "device": "cpu",
        "model": str(folder / "bert"), "out": str(folder / "out"),
    }  # fmt: skip
    return Settings(task=task, **short | changes)


def records(out):
    """Of the epochs, as metrics.json has them."""
    return json.loads((out / "metrics.json").read_text())["epochs"]


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Adam makes whole steps of gradients that are but rounding, such as the keys' biases. With this it
# makes them in proportion: what two runs round otherwise then moves their weights as little.
SteadyAdamW = functools.partial(torch.optim.AdamW, eps=1e-2)


def shared_settings(task, folder, name):
    """Of a run by one process or by two: few rows a step, so that some steps have a process without
    any; a test row alone, so that one process judges nothing."""
    out = str(folder / f"{name}-{task}")
    if task in ("ner", "qa", "translation"):
        return settings(task, folder, out=out, batch_tokens=60)
    weights = ["a=3", "b=0.5"] if task == "classification" else None
    return settings(task, folder, out=out, batch_tokens=25, class_weights=weights)
