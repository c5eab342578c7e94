"""``bert-fast finetune``: a BERT checkpoint, a task, its rows."""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bert_fast.extras import can_draw
from bert_fast.files import atomic_path
from bert_fast.training import predict, tasks
from bert_fast.training.options import add_options, option
from bert_fast.training.processes import Group, read_state
from bert_fast.training.tokens import digest
from bert_fast.training.trainer import Trainer
from bert_fast.training.tuned import Tuned

TOKENIZER_SETTINGS = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# The files that a run reads; what may change when it is resumed, beside their places.
FILES = "train", "train_targets", "test", "test_targets", "validation", "validation_targets"
FREE = {*FILES, "model", "out", "device", "save_every", "resume", "overwrite", "max_length",
        "class_weights"}  # fmt: skip


@dataclass
class Settings:
    """A run; the command line's options, by the same names."""

    task: str = option("what the model is to do", choices=list(tasks.TASKS))
    model: str = option("directory of a Hugging Face BERT checkpoint")
    train: str = option("the training rows")
    out: str = option("directory for the model, its metrics and a plot")
    test: str | None = option(
        "test rows, for the figures at the end (default: --validation's, or a tenth of --train)",
        None,
    )
    validation: str | None = option(
        "rows that the epochs are judged by, for keep and patience (default: the test rows)", None
    )
    train_targets: str | None = option(
        "translation: a file aligned with --train, one text per line", None
    )
    test_targets: str | None = option("translation: a file aligned with --test", None)
    validation_targets: str | None = option("translation: a file aligned with --validation", None)
    decoder_layers: int = option("translation: layers of the new decoder", 3)
    target_vocab: int = option("translation: size of the target vocabulary", 8192)
    beams: int = option("translation: beams of the search; 1 is greedy", 4)
    epochs: int | None = option("passes over the training rows (default by task: 2, 3 or 10)", None)
    lr: float | None = option("highest learning rate (default by task: 3e-5, 5e-5 or 5e-4)", None)
    batch_tokens: int = option("tokens per step", 2048)
    max_length: int | None = option(
        "tokens per text; longer ones are cut, or for ner and qa read in windows (default 128, or "
        "the model's positions)",
        None,
    )
    class_weights: list | dict | None = option(
        "classification, sentiment, ner: weights of the labels in the loss: balanced (by how many "
        "rows or words have each, as scikit-learn does), label=weight ..., or a .json file of them",
        None,
    )
    keep: str = option(
        "the epoch whose weights are saved: the best by the task's first figure on the validation "
        "rows, or the last, unjudged until then",
        "best",
        choices=["best", "last"],
    )
    patience: int | None = option("stop after so many epochs that are no better", None)
    warmup: float = option("share of the steps that warm up", 0.1)
    weight_decay: float = option("weight decay of matrices", 0.01)
    clip: float = option("gradients are clipped to this norm", 1.0)
    seed: int = option("random seed", 0)
    device: str = option("auto, cpu or cuda", "auto")
    save_every: int | None = option(
        "steps between checkpoints, beside the one after each epoch", None
    )
    resume: bool = option("resume from the checkpoint in --out, if there is one", False)
    overwrite: bool = option("replace what is in --out, if it is not empty", False)

    def __post_init__(self):
        if self.task not in tasks.TASKS:
            raise ValueError(f"task must be one of {', '.join(tasks.TASKS)}, not {self.task!r}")
        for name, least in (
            ("epochs", 1), ("batch_tokens", 1), ("max_length", 8), ("decoder_layers", 1),
            ("target_vocab", 300), ("beams", 1), ("patience", 1),
            ("save_every", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        targets = self.train_targets, self.test_targets, self.validation_targets
        if any(path is not None for path in targets) and self.task != "translation":
            raise ValueError("train_targets and test_targets are for the task translation, as "
                             "validation_targets are")  # fmt: skip
        if self.class_weights is not None and not tasks.TASKS[self.task].has_classes:
            having = ", ".join(name for name, kind in tasks.TASKS.items() if kind.has_classes)
            raise ValueError(f"class_weights are for the tasks {having}; {self.task} has no "
                             "labels of which one is right")  # fmt: skip
        if self.keep not in ("best", "last"):
            raise ValueError(f"keep must be best or last, not {self.keep!r}")
        if self.patience is not None and self.keep == "last":
            raise ValueError("patience needs keep best: epochs are not judged with keep last")
        if self.validation is not None and self.keep == "last":
            raise ValueError("validation needs keep best: epochs are not judged with keep last")
        for name in ("test", "validation"):
            if getattr(self, f"{name}_targets") is not None and getattr(self, name) is None:
                raise ValueError(f"{name}_targets needs {name}")
        if self.resume and self.overwrite:
            raise ValueError("resume goes on with what is in out, overwrite replaces it: give one")


def finetune(settings, progress=None):
    """Trains, judges and saves as ``settings`` say; returns (:class:`Tuned`, figures).
    ``progress(done, steps, loss)`` is called after each step. Under torchrun every process calls
    this; the first one writes.

    Raises:
        DataError, CheckpointError, ValueError: before training begins, naming what is wrong.
    """
    with Group.join(settings.device) as group:
        return _finetune(settings, group, progress or (lambda done, steps, loss: None))


def _finetune(settings, group, progress):
    out, state_path = Path(settings.out), Path(settings.out) / "training_state.pt"
    group.first(_may_write, settings, out, state_path)
    task = tasks.TASKS[settings.task]()
    task.configure(settings)
    rng = np.random.default_rng(settings.seed)
    rows = _read(task, settings.train, settings.train_targets)
    test, validation = (
        path and _read(task, path, targets)
        for path, targets in ((settings.test, settings.test_targets),
                              (settings.validation, settings.validation_targets))
    )  # fmt: skip
    if not test and not validation:
        order = rng.permutation(len(rows))
        held_out = max(1, len(rows) // 10)
        if held_out == len(rows):
            raise ValueError(f"{settings.train}: one row cannot be split; give test")
        test, rows = ([rows[i] for i in part] for part in (order[:held_out], order[held_out:]))
    state = None
    if settings.resume and state_path.is_file():
        state = read_state(state_path, _binding(settings))
        task.take(state["fitted"])
    else:
        if group.rank == 0:
            task.fit(rows)
        # Of one process for all: two trainings of a tokenizer may break ties differently.
        task.take(group.share(task.fitted() if group.rank == 0 else None))
    if settings.class_weights is not None:
        task.class_weights = tasks.class_weights(
            settings.class_weights, task.labels, task.truth(rows)
        )
    torch.manual_seed(settings.seed)
    model = task.new_model(settings.model).to(group.device).train()
    tuned = Tuned(task, model, settings.model, settings.max_length)
    inputs = _inputs(settings, tuned)
    if state is not None:
        _unchanged(state["inputs"], inputs, state_path)
    for judged in (validation or [], test or []):
        task.check(judged)  # before any time is spent
    trainer = Trainer(settings, group, tuned, tuned.features(rows), rng)
    if state is not None:
        trainer.load(state)
    else:
        group.first(_begin, out, state_path)
    about = {"settings": _binding(settings), "inputs": inputs, "fitted": task.fitted()}
    save = functools.partial(group.first, Trainer.save, trainer, state_path)
    trainer.train(validation or test, lambda: save(about), progress)
    predictions = trainer.predict(test or validation)
    figures = task.judge(test or validation, predictions)
    figures |= {f"{name}_rows": len(of) for name, of in (
        ("test", test), ("validation", validation), ("train", rows)) if of}  # fmt: skip
    figures |= {"steps": trainer.step, "epoch": trainer.best}
    group.first(_save, settings, trainer, figures, test or validation, predictions)
    group.first(state_path.unlink, True)
    return tuned, figures


def _may_write(settings, out, state_path):
    if settings.resume:
        if not state_path.is_file() and (out / "metrics.json").is_file():
            raise ValueError(f"{out} holds a run that is done: there is nothing to resume")
    elif not settings.overwrite and out.is_dir() and any(out.iterdir()):
        which = "--resume goes on with it, " if state_path.is_file() else ""
        raise ValueError(
            f"{out} exists and is not empty; {which}--overwrite replaces what is in it"
        )


def _begin(out, state_path):
    """Another run's traces would be taken for this one's."""
    out.mkdir(parents=True, exist_ok=True)
    for path in (state_path, out / "metrics.json"):
        path.unlink(missing_ok=True)


def _binding(settings):
    """The settings that a resumed run must share, all but :data:`FREE`."""
    values = dataclasses.asdict(settings)
    return {name: value for name, value in values.items() if name not in FREE}


def _inputs(settings, tuned):
    """Digests of what a run is made of, wherever it lies; the weights that it gives classes."""
    model = Path(settings.model)
    weights = [path for path in model.iterdir() if path.suffix in (".safetensors", ".bin")]
    files = {name: path and digest(path) for name in FILES if (path := getattr(settings, name))}
    return {
        **dict.fromkeys(FILES), **files,
        "model": [digest(path) for path in (model / "config.json", *sorted(weights))],
        "tokenizer": [hashlib.sha256(tuned.tokenizer.to_str().encode()).hexdigest(), tuned.side],
        "max_length": tuned.max_length, "class_weights": tuned.task.class_weights,
    }  # fmt: skip


def _unchanged(before, now, state_path):
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(f"--resume: {name} is not what {state_path} was made of")


def _read(task, path, targets):
    return task.read(path) if targets is None else task.read_aligned(path, targets)


def _save(settings, trainer, figures, test, predictions):
    out, tuned = Path(settings.out), trainer.tuned
    figures = figures | {"training_seconds": trainer.seconds}
    tuned.model.save_pretrained(out)
    tuned.task.save(out)
    for name in TOKENIZER_SETTINGS:  # what transformers reads beside tokenizer.json
        if (given := Path(settings.model) / name).is_file():
            shutil.copyfile(given, out / name)
    with atomic_path(out / "tokenizer.json") as path:
        tuned.save_tokenizer(path)
    with atomic_path(out / "metrics.json") as path:
        settings = dataclasses.asdict(settings)
        whole = {"figures": figures, "epochs": trainer.records, "settings": settings}
        Path(path).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if not can_draw(out / "test.png"):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    tuned.task.draw(figure.subplots(), test, predictions)
    with atomic_path(out / "test.png") as path:
        figure.savefig(path, format="png", dpi=120)


def command_finetune(args):
    """Fine-tune a BERT for a task and evaluate it on test rows; several processes by ``torchrun -m
    bert_fast.cli``."""
    names = [f.name for f in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(args, name) for name in names})
    if int(os.environ.get("RANK", 0)):
        finetune(settings)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(), TextColumn("{task.completed}/{task.total} {task.description}")
    with Progress(*columns, TimeRemainingColumn()) as bar:
        line = bar.add_task("reading")

        def show(done, steps, loss):
            bar.update(line, total=steps, completed=done, description=f"loss {loss:.3f}")

        _, figures = finetune(settings, show)
    said = (f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
    print(f"{', '.join(said)}\n{settings.out}: model.safetensors, tokenizer.json, test.png")


def add_parsers(commands):
    sub = commands.add_parser("finetune", help=command_finetune.__doc__)
    add_options(sub, Settings)
    sub.set_defaults(function=command_finetune)
    predict.add_parser(commands)
