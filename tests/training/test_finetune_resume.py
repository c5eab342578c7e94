"""A run of ``finetune`` that is broken off and resumed, and what a resumed run refuses."""

import json
import random

import drawn
import numpy as np
import pytest
import torch
import transformers
from drawn import seeded  # noqa: F401

from bert_fast.training import tasks
from bert_fast.training.finetune import finetune


class Broken(Exception):
    """A run was stopped here."""


def broken(settings, at):
    """Runs until step ``at``."""

    def stop(done, steps, loss):
        if done == at:
            raise Broken

    with pytest.raises(Broken):
        finetune(settings, stop)


@pytest.mark.parametrize("task", ["classification", "ner", "translation"])
@pytest.mark.parametrize("save_every", [None, 1, 3])
def test_resumed_bit_for_bit(tmp_path, monkeypatch, task, save_every):
    """With dropout, at drawn steps: losses, figures, the best epoch and the weights are those of a
    run that nobody disturbed. A tokenizer that was trained is not trained again."""
    settings = drawn.settings(task, tmp_path, dropout=0.2, save_every=save_every, patience=2)
    whole, wanted = finetune(settings)
    fits, fit = [], tasks.TASKS[task].fit
    monkeypatch.setattr(
        tasks.TASKS[task], "fit", lambda self, rows: fits.append(1) or fit(self, rows)
    )
    settings = drawn.settings(
        task, tmp_path, out=str(tmp_path / "again"), save_every=save_every, patience=2
    )
    seen = drawn.records(tmp_path / "out")
    first = seen[0]["step"] + 1  # after the first checkpoint, whatever save_every says
    broken(settings, first)
    last = wanted["steps"]
    settings.resume = True
    if first < last:
        broken(settings, random.randint(first + 1, last))
    state = torch.load(tmp_path / "again" / "training_state.pt", weights_only=True)
    assert state["step"] > 0
    found, figures = finetune(settings)
    assert figures == wanted
    assert drawn.records(tmp_path / "again") == seen
    assert drawn.same_weights(found.model, whole.model)
    assert len(fits) == 1
    assert not (tmp_path / "again" / "training_state.pt").exists()
    auto = {"classification": "SequenceClassification", "ner": "TokenClassification",
            "translation": "Seq2SeqLM"}[task]  # fmt: skip
    getattr(transformers, f"AutoModelFor{auto}").from_pretrained(tmp_path / "again")
    if task == "translation":
        assert found.task.fitted() == whole.task.fitted()


@pytest.fixture
def stopped(tmp_path):
    """Settings of a run that has a checkpoint, to be resumed."""
    settings = drawn.settings("classification", tmp_path, save_every=1, class_weights=["a=2"])
    broken(settings, 3)
    settings.resume = True
    return settings


CHANGES = {  # settings that change numbers
    "epochs": 4, "lr": 2e-3, "batch_tokens": 121, "keep": "last", "patience": 1, "warmup": 0.2,
    "weight_decay": 0.02, "clip": 0.5, "seed": 1,
}  # fmt: skip


def test_other_settings_are_refused(stopped):
    before = vars(stopped).copy()
    for name, value in CHANGES.items():
        setattr(stopped, name, value)
        with pytest.raises(
            ValueError, match=f"--resume: {name} was {before[name]}, and is {value} "
        ):
            finetune(stopped)
        setattr(stopped, name, before[name])
    for name, value in {"max_length": 25, "class_weights": ["a=3"]}.items():
        setattr(stopped, name, value)
        with pytest.raises(ValueError, match=f"--resume: {name} is not what .*state.pt was made"):
            finetune(stopped)
        setattr(stopped, name, before[name])
    stopped.task = "sentiment"
    with pytest.raises(ValueError, match="--resume: task was classification, and is sentiment"):
        finetune(stopped)


@pytest.mark.parametrize("name", ["train", "test", "model", "tokenizer", "validation"])
def test_other_files_are_refused(stopped, tmp_path, name):
    """Files are known by what is in them, not by where they lie."""
    if name in ("train", "test"):
        path = tmp_path / f"{name}-classification.jsonl"
        path.write_text(path.read_text() + '{"text": "fine", "label": "a"}\n')
    elif name == "validation":
        stopped.validation = stopped.train
    elif name == "model":  # other weights
        drawn.checkpoint(tmp_path / "bert")
    else:
        path = tmp_path / "bert" / "tokenizer.json"
        values = json.loads(path.read_text())
        values["normalizer"]["lowercase"] = False
        path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"--resume: {name} is not what .*state.pt was made of"):
        finetune(stopped)


def test_files_may_move(stopped, tmp_path):
    (tmp_path / "moved").mkdir()
    for name in ("train", "test"):
        path = tmp_path / f"{name}-classification.jsonl"
        setattr(stopped, name, str(path.rename(tmp_path / "moved" / path.name)))
    stopped.model = str((tmp_path / "bert").rename(tmp_path / "moved" / "bert"))
    stopped.class_weights = {"a": 2.0}  # the same, said otherwise
    _, figures = finetune(stopped)
    assert figures["test_rows"] == 8


def test_what_there_is_to_resume(tmp_path, stopped):
    stopped.resume = False
    with pytest.raises(ValueError, match="not empty; --resume goes on with it, --overwrite"):
        finetune(stopped)
    with pytest.raises(ValueError, match="resume goes on with what is in out, overwrite replaces"):
        drawn.settings("classification", tmp_path, resume=True, overwrite=True)
    stopped.overwrite = True  # another run: the checkpoint is forgotten
    broken(stopped, 1)
    assert not (tmp_path / "out" / "training_state.pt").exists()
    stopped.overwrite, stopped.resume = False, True
    finetune(stopped)  # from the beginning, for there was no checkpoint yet
    with pytest.raises(ValueError, match="out holds a run that is done: there is nothing to resu"):
        finetune(stopped)
    (tmp_path / "out" / "training_state.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"training_state\.pt cannot be read"):
        finetune(stopped)


@pytest.mark.parametrize("task", drawn.TASKS)
def test_on_its_device(tmp_path, device, task):
    """A whole run; its first step's loss, before the order of sums has moved a weight, is the
    CPU's: on a GPU, where products are in bfloat16, but for its roundings."""
    first = []

    def note(done, steps, loss):
        if done == 1:
            first.append(float(loss))

    for where in (device, "cpu"):
        out = str(tmp_path / f"out-{where}-{len(first)}")
        settings = drawn.settings(task, tmp_path, out=out, epochs=1, device=where)
        _, figures = finetune(settings, note)
        assert all(np.isfinite(value) for value in figures.values() if isinstance(value, float))
    allowed = dict(rtol=0.05, atol=0.05) if device == "cuda" else dict(rtol=1e-5)
    np.testing.assert_allclose(*first, **allowed)
