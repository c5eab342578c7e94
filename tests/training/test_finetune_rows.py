"""Which rows judge, and which tokens of a row are read: validation rows, the side that is cut,
windows with no word's beginning."""

import json
import random

import drawn
import numpy as np
import pytest
import torch
import transformers
from drawn import seeded  # noqa: F401
from sklearn.metrics import accuracy_score

from bert_fast.cli import main
from bert_fast.training import tasks
from bert_fast.training.finetune import finetune
from bert_fast.training.tuned import Tuned


def test_validation_rows_judge_the_epochs(tmp_path):
    """And test rows the model that was chosen: scikit-learn's accuracy of each."""
    labels = [[random.choice("abc") for _ in range(count)] for count in (11, 17)]
    named = {}
    for name, some in zip(("validation", "test"), labels, strict=True):
        rows = [{"text": " ".join(drawn.words()), "label": label} for label in some]
        named[name] = drawn.write(tmp_path / name, "classification", rows)
    settings = drawn.settings("classification", tmp_path, **named)
    tuned, figures = finetune(settings)
    found = drawn.records(tmp_path / "out")
    assert [figures[f"{name}_rows"] for name in ("train", "validation", "test")] == [30, 11, 17]
    best = int(np.argmax([record["accuracy"] for record in found]))
    assert figures["epoch"] == best + 1

    def accuracy(name, truth):
        predictions = tuned.predict(tuned.task.read(named[name]))
        return accuracy_score(truth, [label for label, _ in predictions])

    assert found[best]["accuracy"] == pytest.approx(accuracy("validation", labels[0]))
    assert figures["accuracy"] == pytest.approx(accuracy("test", labels[1]))


def test_validation_rows_alone(tmp_path):
    """Nothing of the training rows is held out, and they judge the whole."""
    validation = drawn.write(tmp_path / "v", "regression", drawn.rows("regression", 9))
    settings = drawn.settings("regression", tmp_path, validation=validation, test=None)
    _, figures = finetune(settings)
    assert (figures["train_rows"], figures["validation_rows"]) == (30, 9)
    assert "test_rows" not in figures
    best = drawn.records(tmp_path / "out")[figures["epoch"] - 1]
    assert best["pearson"] == figures["pearson"]


def test_aligned_validation_files(tmp_path):
    """Of a translation."""
    lines = [" ".join(drawn.words()) for _ in range(6)]
    for name in ("v.en", "v.de"):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    named = {"validation": str(tmp_path / "v.en"), "validation_targets": str(tmp_path / "v.de")}
    _, figures = finetune(drawn.settings("translation", tmp_path, epochs=1, **named))
    assert figures["validation_rows"] == 6
    with pytest.raises(ValueError, match="validation_targets needs validation"):
        drawn.settings("translation", tmp_path, **named | {"validation": None})
    with pytest.raises(ValueError, match="are for the task translation, as validation_targets"):
        drawn.settings("qa", tmp_path, **named)


def test_validation_rows_that_cannot_judge(tmp_path):
    rows = drawn.write(tmp_path / "v", "classification", [{"text": "film", "label": "q"}])
    with pytest.raises(tasks.DataError, match="'q' is not one of the training rows'"):
        finetune(drawn.settings("classification", tmp_path, validation=rows))
    with pytest.raises(ValueError, match="validation needs keep best"):
        drawn.settings("classification", tmp_path, validation=rows, keep="last")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("where", ["tokenizer_config.json", "tokenizer.json"])
def test_the_side_that_is_cut_is_the_tokenizers(tmp_path, side, where):
    """In training and in prediction, of texts and of pairs: transformers' ids and scores; and what
    is saved cuts there, too."""
    bert = drawn.checkpoint(tmp_path / "bert")
    if where == "tokenizer.json":
        values = json.loads((bert / where).read_text())
        values["truncation"] = {"direction": side.title(), "max_length": 40, "stride": 0,
                                "strategy": "LongestFirst"}  # fmt: skip
        (bert / where).write_text(json.dumps(values))
    else:
        (bert / where).write_text(json.dumps({
            "tokenizer_class": "BertTokenizer", "truncation_side": side,
        }))  # fmt: skip
    rows = drawn.rows("classification", 12)
    for row in rows:
        row["text"] = " ".join(drawn.words(5, 30))
        row["text_b"] = " ".join(drawn.words(5, 30))
    path = drawn.write(tmp_path / "pairs", "classification", rows)
    alone = drawn.write(tmp_path / "texts", "classification", [
        {"text": row["text"], "label": row["label"]} for row in rows
    ])  # fmt: skip
    settings = drawn.settings("classification", tmp_path, train=path, test=alone, max_length=12)
    tuned, _ = finetune(settings)
    pairs = [(row["text"], row["text_b"]) for row in rows]
    for directory in (bert, tmp_path / "out"):
        theirs = transformers.AutoTokenizer.from_pretrained(directory, truncation_side=side)
        options = {"truncation": True, "max_length": 12}
        for file, texts in ((path, pairs), (alone, [pair[:1] for pair in pairs])):
            wanted = [theirs(*text, **options)["input_ids"] for text in texts]
            examples = tuned.task.read(file)
            assert [f.ids for f in tuned.features(examples)] == wanted
            again = Tuned.from_pretrained(tmp_path / "out", max_length=12)
            assert [f.ids for f in again.features(examples)] == wanted
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    words = ["predict", "--model", str(tmp_path / "out"), "--rows", path, "--max-length", "12"]
    assert main([*words, "--out", str(tmp_path / "p.jsonl")]) == 0
    said = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    for row, pair in zip(said, pairs, strict=True):
        with torch.no_grad():
            logits = model(**theirs(*pair, return_tensors="pt", **options)).logits[0]
        assert list(row["scores"].values()) == pytest.approx(
            torch.softmax(logits, 0).tolist(), abs=1e-5
        )


def test_a_translations_source_is_cut_there_too(tmp_path):
    bert = drawn.checkpoint(tmp_path / "bert")
    (bert / "tokenizer_config.json").write_text('{"truncation_side": "left"}')
    texts = [" ".join(drawn.words(5, 30)) for _ in range(6)]
    rows = [{"text": text, "target": "film"} for text in texts]
    path = drawn.write(tmp_path / "rows", "translation", rows)
    settings = drawn.settings(
        "translation", tmp_path, train=path, test=path, max_length=9, epochs=1
    )
    tuned, _ = finetune(settings)
    theirs = transformers.AutoTokenizer.from_pretrained(bert)
    wanted = [theirs(text, truncation=True, max_length=9)["input_ids"] for text in texts]
    assert [f.ids for f in tuned.features(tuned.task.read(path))] == wanted


def test_the_tokenizers_longest_input_is_the_default(tmp_path):
    bert = drawn.checkpoint(tmp_path / "bert")
    (bert / "tokenizer_config.json").write_text('{"model_max_length": 10}')
    settings = drawn.settings("classification", tmp_path, max_length=None, epochs=1)
    tuned, _ = finetune(settings)
    text = " ".join(drawn.words(5, 30))
    wanted = transformers.AutoTokenizer.from_pretrained(bert)(text, truncation=True)["input_ids"]
    assert tuned.features([tasks.Example(text)])[0].ids == wanted


def test_windows_that_hold_no_words_beginning(tmp_path):
    """A long word's later windows have no label: they are not learned from, for the mean of no
    losses is NaN. transformers' tokenizer says how many are left."""
    rows = drawn.rows("ner", 12)
    for row in rows[1:8]:
        row["words"][0] = "".join(random.choices("xyz", k=random.randint(20, 60)))
    path = drawn.write(tmp_path / "rows", "ner", rows)
    settings = drawn.settings(
        "ner", tmp_path, train=path, test=path, max_length=10, batch_tokens=1, epochs=1
    )
    _, figures = finetune(settings)
    theirs = transformers.BertTokenizerFast(str(tmp_path / "bert" / "vocab.txt"))
    encoded = theirs(
        [row["words"] for row in rows], is_split_into_words=True, truncation=True, max_length=10,
        stride=8 // 3, return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    windows = len(encoded["input_ids"])
    learned = sum(
        any(word is not None and a == 0
            for word, (a, _) in zip(encoded.word_ids(i), offsets, strict=True))
        for i, offsets in enumerate(encoded["offset_mapping"])
    )  # fmt: skip
    assert figures["steps"] == learned < windows
    assert np.isfinite(drawn.records(tmp_path / "out")[0]["loss"])
