"""Weights of classes: scikit-learn's numbers, torch's loss, and what is refused by name."""

import json
import random

import drawn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from drawn import seeded  # noqa: F401
from sklearn.utils.class_weight import compute_class_weight

from bert_fast.cli import main
from bert_fast.training import tasks
from bert_fast.training.finetune import finetune

HEADS = {"classification": "SequenceClassification", "ner": "TokenClassification"}


def truth_of(task, path):
    read = tasks.TASKS[task]()
    return read.truth(read.read(path))


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("asked", ["balanced", "some"])
def test_weights_are_sklearns(tmp_path, task, asked):
    """Balanced, or of some labels: the others weigh 1."""
    path = drawn.write(tmp_path / "rows", task, drawn.rows(task, 40))
    truth = truth_of(task, path)
    labels = sorted(set(truth))
    given = "balanced"
    if asked == "some":
        given = {label: random.uniform(0, 5) for label in random.sample(labels, 2)}
    wanted = compute_class_weight(given, classes=np.array(labels), y=np.array(truth))
    pairs = ["balanced"] if asked == "balanced" else [f"{k}={v!r}" for k, v in given.items()]
    assert np.allclose(tasks.class_weights(pairs, labels, truth), wanted, rtol=1e-14)
    assert tasks.class_weights(given, labels, truth) == tasks.class_weights(pairs, labels, truth)
    (tmp_path / "w.json").write_text(json.dumps(dict(zip(labels, wanted.tolist(), strict=True))))
    found = tasks.class_weights([str(tmp_path / "w.json")], labels, truth)
    assert np.allclose(found, wanted, rtol=1e-14)


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("asked", ["balanced", "drawn"])
def test_the_loss_is_torchs(tmp_path, task, asked):
    """One step over all rows that moves nothing: its loss is torch's cross-entropy with these
    weights, of the logits of transformers' model on the same rows."""
    settings = drawn.settings(
        task, tmp_path, epochs=1, lr=1e-30, batch_tokens=10**6, max_length=40, keep="last",
    )  # fmt: skip
    truth = truth_of(task, settings.train)
    labels = sorted(set(truth))
    given = {label: random.uniform(0.1, 5) for label in labels}
    settings.class_weights = given if asked == "drawn" else ["balanced"]
    tuned, _ = finetune(settings)
    weights = compute_class_weight(
        given if asked == "drawn" else "balanced", classes=np.array(labels), y=np.array(truth)
    )
    auto = getattr(transformers, f"AutoModelFor{HEADS[task]}")
    theirs = auto.from_pretrained(tmp_path / "out").eval()
    inputs = tuned.batch(tuned.features(tuned.task.read(settings.train)), labelled=True)
    wanted_labels = inputs.pop("labels").flatten()
    assert (wanted_labels != -100).sum() == len(truth)
    with torch.no_grad():
        logits = theirs(**inputs).logits.flatten(0, -2)
    weights = torch.tensor(weights, dtype=torch.float32)
    wanted = F.cross_entropy(logits, wanted_labels, weight=weights).item()
    (record,) = drawn.records(tmp_path / "out")
    assert record["loss"] == pytest.approx(wanted, rel=1e-5)
    plain = F.cross_entropy(logits, wanted_labels).item()
    if abs(plain - wanted) > 1e-3 * wanted:  # nearly always
        assert record["loss"] != pytest.approx(plain, rel=1e-5)


def test_a_class_that_weighs_nothing(tmp_path):
    """Is not learned from, and a batch of it alone is no 0 / 0: as if its rows were not there."""
    settings = drawn.settings("classification", tmp_path, batch_tokens=1)
    settings.class_weights = ["a=0"]
    finetune(settings)
    count = sum(label != "a" for label in truth_of("classification", settings.train))
    found = drawn.records(tmp_path / "out")
    assert [record["step"] for record in found] == [count, 2 * count, 3 * count]
    assert np.isfinite([record["loss"] for record in found]).all()
    settings.class_weights, settings.overwrite = {"a": 0, "b": 0, "c": 0}, True
    with pytest.raises(tasks.DataError, match="no row has a label that counts"):
        finetune(settings)


def test_on_the_command_line(tmp_path, capsys):
    settings = drawn.settings("ner", tmp_path)
    words = ["finetune", "--task", "ner", "--model", settings.model, "--train", settings.train]
    words += ["--out", settings.out, "--max-length", "24", "--epochs", "1", "--class-weights"]
    assert main([*words, "O=0.5", "B-x=2"]) == 0
    said = json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]
    assert said["class_weights"] == ["O=0.5", "B-x=2"]
    assert main([*words, "O=0.5", "Q=2", "--overwrite"]) == 1
    assert "class_weights: 'Q' is none of the training rows' labels" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["multi-label", "regression", "qa", "translation"])
def test_tasks_without_classes_refuse_them(tmp_path, task):
    with pytest.raises(ValueError, match=f"class_weights are for .*ner; {task} has no labels"):
        drawn.settings(task, tmp_path, class_weights=["balanced"])


@pytest.mark.parametrize(("asked", "message"), [
    (["a=-1"], "'a' must weigh 0 or more, not -1.0"),
    (["a=nan"], "'a' must weigh 0 or more, not nan"),
    (["a=inf"], "'a' must weigh 0 or more, not inf"),
    (["a=much"], "'a' must weigh 0 or more, not 'much'"),
    ([{"a": True}], "'a' must weigh 0 or more, not True"),
    (["a=1", "a=2"], "'a' is given twice"),
    (["a"], "class_weights must be balanced, a .json file or label=weight, not 'a'"),
    (["balanced", "a=2"], "a .json file or label=weight, not 'balanced'"),
    (["x=1"], "'x' is none of the training rows' labels: a, b"),
])  # fmt: skip
def test_what_is_no_weight_is_refused(asked, message):
    asked = asked[0] if isinstance(asked[0], dict) else asked
    with pytest.raises(ValueError, match=message):
        tasks.class_weights(asked, ["a", "b"], ["a", "b", "b"])


def test_a_file_that_is_no_object_is_refused(tmp_path):
    path = tmp_path / "w.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"w\.json must be an object"):
        tasks.class_weights([str(path)], ["a", "b"], ["a", "b"])
