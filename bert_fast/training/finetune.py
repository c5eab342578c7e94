"""``bert-fast finetune`` and ``bert-fast predict``: a BERT checkpoint, a task, its rows."""

import dataclasses
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from bert_fast.backends import resolve_device
from bert_fast.embeddings.backbone import positions
from bert_fast.embeddings.tokenizer import batches_by_tokens, load_tokenizer
from bert_fast.extras import can_draw
from bert_fast.files import CheckpointError, atomic_path
from bert_fast.models.inference import Precision
from bert_fast.text import read_texts
from bert_fast.training import tasks
from bert_fast.training.models import load_model, takes_types
from bert_fast.training.optim import parameter_groups, warmup_then_linear_decay
from bert_fast.training.options import add_options, option

TOKENIZER_SETTINGS = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


@dataclass
class Settings:
    """A run; the command line's options, by the same names."""

    task: str = option("what the model is to do", choices=list(tasks.TASKS))
    model: str = option("directory of a Hugging Face BERT checkpoint")
    train: str = option("the training rows")
    out: str = option("directory for the model, its metrics and a plot")
    test: str | None = option("test rows (default: a tenth of --train)", None)
    train_targets: str | None = option(
        "translation: a file aligned with --train, one text per line", None
    )
    test_targets: str | None = option("translation: a file aligned with --test", None)
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
    keep: str = option(
        "the epoch whose weights are saved: the best by the task's first figure on the test rows, "
        "or the last, unjudged until then",
        "best",
        choices=["best", "last"],
    )
    patience: int | None = option("stop after so many epochs that are no better", None)
    warmup: float = option("share of the steps that warm up", 0.1)
    weight_decay: float = option("weight decay of matrices", 0.01)
    clip: float = option("gradients are clipped to this norm", 1.0)
    seed: int = option("random seed", 0)
    device: str = option("auto, cpu or cuda", "auto")
    overwrite: bool = option("replace what is in --out, if it is not empty", False)

    def __post_init__(self):
        if self.task not in tasks.TASKS:
            raise ValueError(f"task must be one of {', '.join(tasks.TASKS)}, not {self.task!r}")
        for name, least in (
            ("epochs", 1), ("batch_tokens", 1), ("max_length", 8), ("decoder_layers", 1),
            ("target_vocab", 300), ("beams", 1), ("patience", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        aligned = self.train_targets is not None or self.test_targets is not None
        if aligned and self.task != "translation":
            raise ValueError("train_targets and test_targets are for the task translation")
        if self.keep not in ("best", "last"):
            raise ValueError(f"keep must be best or last, not {self.keep!r}")
        if self.patience is not None and self.keep == "last":
            raise ValueError("patience needs keep best: epochs are not judged with keep last")
        if self.test_targets is not None and self.test is None:
            raise ValueError("test_targets needs test")


class Tuned:
    """A model with a task's head, its tokenizer, and its task: what ``finetune`` leaves behind."""

    def __init__(self, task, model, tokenizer, max_length=None):
        self.task, self.model, self.tokenizer = task, model, tokenizer
        longest = positions(model)
        max_length = max_length or min(128, longest)
        if max_length > longest:
            raise ValueError(f"max_length is {max_length}; the model has {longest} positions")
        self.pad, self.takes_types = model.config.pad_token_id or 0, takes_types(model)
        self.max_length = max_length

    @classmethod
    def from_pretrained(cls, directory, max_length=None, device="cpu", dtype=None):
        """A directory of ``finetune``'s, or of Hugging Face's with a head for one of the tasks."""
        directory = Path(directory)
        try:
            values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            (architecture,) = values["architectures"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{directory}: config.json names no model: {error!r}") from error
        kinds = [kind for kind in tasks.TASKS.values() if _does(kind, architecture)]
        if not kinds:
            raise CheckpointError(f"{directory} holds a {architecture}, which is no task's model")
        on_cpu = torch.device(device).type == "cpu"
        if dtype is not None and not on_cpu:
            raise ValueError(f"--dtype {dtype} is for the CPU: give --device cpu")
        model = load_model(kinds[0].model, directory, prepack=on_cpu, dtype=dtype)
        # A single logit is a score, whatever it was trained for: alone it has no rival.
        single = "regression" if getattr(model.config, "num_labels", 2) == 1 else tasks.SINGLE
        problem = values.get("problem_type") or single
        kinds = [kind for kind in kinds if kind.problem_type in (None, problem)]
        if not kinds:
            raise CheckpointError(f"{directory}: problem_type {problem!r} is no task's")
        task = kinds[0]()
        task.load(directory, model.config)
        tokenizer = _plain(load_tokenizer(directory))
        return cls(task, model.to(device).eval(), tokenizer, max_length)

    def features(self, examples):
        return self.task.features(self.tokenizer, examples, self.max_length)

    @torch.inference_mode()
    def predict(self, examples, batch_tokens=8192):
        """A prediction an example, as the task has it."""
        was_training, features = self.model.training, self.features(examples)
        self.model.eval()
        outputs = [None] * len(features)
        for some in batches_by_tokens([len(f.ids) for f in features], batch_tokens):
            batch = [features[i] for i in some]
            found = self.task.run(self.model, self.batch(batch), [len(f.ids) for f in batch])
            for i, output in zip(some, found, strict=True):
                outputs[i] = output
        self.model.train(was_training)
        return self.task.predictions(examples, features, outputs)

    def batch(self, features, labelled=False):
        """The model's arguments. Masks stay on the CPU, where padding is counted at once."""
        seqlen = max(len(feature.ids) for feature in features)
        ids = torch.full((len(features), seqlen), self.pad, dtype=torch.int64)
        types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, feature in enumerate(features):
            length = len(feature.ids)
            ids[row, :length] = torch.tensor(feature.ids)
            types[row, :length] = torch.tensor(feature.types)
            mask[row, :length] = 1
        labels = self.task.label_tensors(features, seqlen) if labelled else {}
        device = next(self.model.parameters()).device
        inputs = {"input_ids": ids, "attention_mask": mask, **labels}
        if self.takes_types:
            inputs["token_type_ids"] = types
        return {
            name: value if name.endswith("mask") else value.to(device, non_blocking=True)
            for name, value in inputs.items()
        }


def _does(kind, architecture):
    """Whether an architecture of any family is that of a task's model."""
    head = kind.model.__name__.removeprefix("Bert")
    return architecture == head or (head.startswith("For") and architecture.endswith(head))


def _plain(tokenizer):
    tokenizer.no_padding()
    return tokenizer


def finetune(settings, progress=None):
    """Trains, judges and saves as ``settings`` say; returns (:class:`Tuned`, figures).
    ``progress(done, steps, loss)`` is called after each step.

    Raises:
        DataError, CheckpointError, ValueError: before training begins, naming what is wrong.
    """
    out = Path(settings.out)
    if not settings.overwrite and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty; --overwrite replaces what is in it")
    task = tasks.TASKS[settings.task]()
    task.configure(settings)
    rng = np.random.default_rng(settings.seed)
    rows = _read(task, settings.train, settings.train_targets)
    if settings.test:
        test = _read(task, settings.test, settings.test_targets)
    else:
        order = rng.permutation(len(rows))
        cut = max(1, len(rows) // 10)
        if cut == len(rows):
            raise ValueError(f"{settings.train}: one row cannot be split; give test")
        test, rows = ([rows[i] for i in part] for part in (order[:cut], order[cut:]))
    task.fit(rows)
    torch.manual_seed(settings.seed)
    model = task.new_model(settings.model)
    device = resolve_device(settings.device)
    tokenizer = _plain(load_tokenizer(settings.model))
    tuned = Tuned(task, model.to(device).train(), tokenizer, settings.max_length)
    task.check(test)  # before any time is spent
    epochs, best, seconds = _train(settings, tuned, tuned.features(rows), rng, test, progress)
    predictions = tuned.predict(test)
    figures = task.judge(test, predictions)
    figures |= {"test_rows": len(test), "train_rows": len(rows), "steps": epochs[-1]["step"]}
    figures["epoch"] = best
    _save(settings, tuned, figures | {"training_seconds": seconds}, epochs, test, predictions)
    return tuned, figures


def _read(task, path, targets):
    return task.read(path) if targets is None else task.read_aligned(path, targets)


def _train(settings, tuned, features, rng, test, progress):
    """A record an epoch, the kept one's number, and the seconds without judging. The model is left
    with the kept epoch's weights."""
    task, model = tuned.task, tuned.model
    lengths = np.array([task.tokens(feature) for feature in features])
    epochs = [
        list(_shuffled_batches(lengths, settings.batch_tokens, rng))
        for _ in range(settings.epochs or task.epochs)
    ]
    steps = sum(map(len, epochs))
    lr = settings.lr or task.lr
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=lr)
    schedule = warmup_then_linear_decay(optimizer, round(settings.warmup * steps), steps)
    records, done, seconds = [], 0, 0.0
    best, highest, weights = len(epochs), -math.inf, None
    for epoch, batches in enumerate(epochs, 1):
        losses, began = [], time.perf_counter()
        for some in batches:
            done += 1
            inputs = tuned.batch([features[i] for i in some], labelled=True)
            with torch.autocast("cuda", torch.bfloat16, enabled=inputs["input_ids"].is_cuda):
                loss = model(**inputs).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            if not torch.isfinite(norm):
                raise ValueError(f"step {done}: the gradient's norm is {norm.item()}: lower lr")
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if progress is not None:
                progress(done, steps, losses[-1])
        seconds += time.perf_counter() - began
        records.append({"epoch": epoch, "step": done, "loss": float(np.mean(losses))})
        if settings.keep == "last":
            continue
        figures = task.judge(test, tuned.predict(test))
        records[-1] |= figures
        figure = next(iter(figures.values()))  # of every task: more is better
        if weights is None or figure > highest:
            best, highest = epoch, figure
            weights = {name: w.to("cpu", copy=True) for name, w in model.state_dict().items()}
        elif settings.patience is not None and epoch - best >= settings.patience:
            break
    if weights is not None and best != epoch:
        model.load_state_dict(weights)
    return records, best, seconds


def _shuffled_batches(lengths, budget, rng):
    batch, used = [], 0
    for i in rng.permutation(len(lengths)):
        if batch and used + lengths[i] > budget:
            yield batch
            batch, used = [], 0
        batch.append(i)
        used += lengths[i]
    if batch:
        yield batch


def _save(settings, tuned, figures, epochs, test, predictions):
    out = Path(settings.out)
    tuned.model.save_pretrained(out)
    tuned.task.save(out)
    for name in TOKENIZER_SETTINGS:  # what transformers reads beside tokenizer.json
        if (given := Path(settings.model) / name).is_file():
            shutil.copyfile(given, out / name)
    tuned.tokenizer.no_truncation()
    with atomic_path(out / "tokenizer.json") as path:
        tuned.tokenizer.save(str(path))
    with atomic_path(out / "metrics.json") as path:
        settings = dataclasses.asdict(settings)
        whole = {"figures": figures, "epochs": epochs, "settings": settings}
        Path(path).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if not can_draw(out / "test.png"):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    tuned.task.draw(figure.subplots(), test, predictions)
    with atomic_path(out / "test.png") as path:
        figure.savefig(path, format="png", dpi=120)


def command_finetune(args):
    """Fine-tune a BERT for a task and evaluate it on test rows."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    names = [f.name for f in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(args, name) for name in names})
    columns = BarColumn(), TextColumn("{task.completed}/{task.total} {task.description}")
    with Progress(*columns, TimeRemainingColumn()) as bar:
        line = bar.add_task("reading")

        def show(done, steps, loss):
            bar.update(line, total=steps, completed=done, description=f"loss {loss:.3f}")

        _, figures = finetune(settings, show)
    said = (f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
    print(f"{', '.join(said)}\n{settings.out}: model.safetensors, tokenizer.json, test.png")


def command_predict(args):
    """Predictions of a fine-tuned model, one JSON object per row."""
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise ValueError(f"{out} exists; --overwrite replaces it")
    tuned = Tuned.from_pretrained(
        args.model, args.max_length, resolve_device(args.device), args.dtype
    )
    translates = isinstance(tuned.task, tasks.Translation)
    if args.beams is not None:
        if not translates or args.beams < 1:
            raise ValueError("--beams is for translation, and at least 1")
        tuned.task.beams = args.beams
    path = Path(args.rows)
    plain = path.suffix == ".txt" or (translates and path.suffix not in tasks.ROW_FORMATS)
    if plain and not isinstance(tuned.task, tasks.QuestionAnswering):
        tagging = isinstance(tuned.task, tasks.Tagging)
        texts = read_texts(path, keep_blank=True)
        examples = [tasks.Example(text.split() if tagging else text) for text in texts]
    else:
        examples = tuned.task.read(path, labelled=False)
    with atomic_path(out) as written, open(written, "w", encoding="utf-8") as file:
        for example, prediction in zip(examples, tuned.predict(examples), strict=True):
            row = {"text": example.text, **tuned.task.row(prediction)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(examples)} rows: {out}")


def add_parsers(commands):
    sub = commands.add_parser("finetune", help=command_finetune.__doc__)
    add_options(sub, Settings)
    sub.set_defaults(function=command_finetune)
    sub = commands.add_parser("predict", help=command_predict.__doc__)
    sub.add_argument("--model", required=True, help="a directory that finetune wrote")
    sub.add_argument(
        "--rows", required=True, help="rows as for training, or .txt with one text per line"
    )
    sub.add_argument("--out", required=True, help="the .jsonl file to write predictions to")
    sub.add_argument("--max-length", type=int, help="tokens per text (default 128)")
    sub.add_argument("--beams", type=int, help="translation: beams of the search (default 4)")
    sub.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"),
                     help="default: the GPU where there is one")  # fmt: skip
    sub.add_argument("--dtype", choices=get_args(Precision),
                     help="of the encoder's products, on a CPU (default float32)")  # fmt: skip
    sub.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    sub.set_defaults(function=command_predict)
