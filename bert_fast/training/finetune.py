"""``bert-fast finetune`` and ``bert-fast predict``: a BERT checkpoint, a task, its rows."""

import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bert_fast.embeddings.tokenizer import batches_by_tokens, load_tokenizer
from bert_fast.files import atomic_path
from bert_fast.models.checkpoint import CheckpointError
from bert_fast.training import tasks
from bert_fast.training.optim import parameter_groups, warmup_then_linear_decay


@dataclass
class Settings:
    """A run; the command line's options, by the same names."""

    task: str = field(metadata={"choices": list(tasks.TASKS)})
    model: str = field(metadata={"help": "a Hugging Face BERT checkpoint's directory"})
    train: str = field(metadata={"help": "the training rows"})
    out: str = field(metadata={"help": "directory for the model, its figures and their picture"})
    test: str | None = field(default=None, metadata={"help": "rows to judge by; default a tenth"})
    train_targets: str | None = field(
        default=None, metadata={"help": "translation: a file aligned with train, a text a line"}
    )
    test_targets: str | None = field(default=None, metadata={"help": "translation: of test"})
    decoder_layers: int = field(default=3, metadata={"help": "translation: of the new decoder"})
    target_vocab: int = field(default=8192, metadata={"help": "translation: tokens to write with"})
    beams: int = field(default=4, metadata={"help": "translation: of the search; 1 is greedy"})
    epochs: int | None = field(default=None, metadata={"help": "default by task: 2, 3 or 10"})
    lr: float | None = field(default=None, metadata={"help": "default by task: 3e-5, 5e-5 or 5e-4"})
    batch_tokens: int = field(default=2048, metadata={"help": "tokens a step"})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "tokens a text, longer ones are cut (default 128, or the model's positions)"
        },
    )
    warmup: float = field(default=0.1, metadata={"help": "share of the steps"})
    weight_decay: float = field(default=0.01, metadata={"help": "of matrices"})
    clip: float = field(default=1.0, metadata={"help": "largest norm of the gradient"})
    seed: int = field(default=0, metadata={"help": "of everything that is drawn"})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})

    def __post_init__(self):
        if self.task not in tasks.TASKS:
            raise ValueError(f"task must be one of {', '.join(tasks.TASKS)}, not {self.task!r}")
        for name, least in (
            ("epochs", 1), ("batch_tokens", 1), ("max_length", 8), ("decoder_layers", 1),
            ("target_vocab", 300), ("beams", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        aligned = self.train_targets is not None or self.test_targets is not None
        if aligned and self.task != "translation":
            raise ValueError("train_targets and test_targets are for the task translation")
        if self.test_targets is not None and self.test is None:
            raise ValueError("test_targets needs test")


class Tuned:
    """A model with a task's head, its tokenizer, and its task: what ``finetune`` leaves behind."""

    def __init__(self, task, model, tokenizer, max_length=None):
        self.task, self.model, self.tokenizer = task, model, tokenizer
        positions = model.config.max_position_embeddings
        max_length = max_length or min(128, positions)
        if max_length > positions:
            raise ValueError(f"max_length is {max_length}; the model has {positions} positions")
        self.max_length = max_length

    @classmethod
    def from_pretrained(cls, directory, max_length=None, device="cpu"):
        """A directory of ``finetune``'s, or of Hugging Face's with a head for one of the tasks."""
        directory = Path(directory)
        try:
            values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            (architecture,) = values["architectures"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{directory}: config.json names no model: {error!r}") from error
        for kind in tasks.TASKS.values():
            problem = values.get("problem_type") or tasks.SINGLE
            if kind.model.__name__ == architecture and kind.problem_type in (None, problem):
                break
        else:
            raise CheckpointError(f"{directory} holds a {architecture}, which is no task's model")
        task, model = kind(), kind.model.from_pretrained(directory, torch.float32)
        task.load(directory, model.config)
        model = model.to(device).eval().prepack()
        return cls(task, model, _plain(load_tokenizer(directory)), max_length)

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
        ids = torch.zeros(len(features), seqlen, dtype=torch.int64)
        types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, feature in enumerate(features):
            length = len(feature.ids)
            ids[row, :length] = torch.tensor(feature.ids)
            types[row, :length] = torch.tensor(feature.types)
            mask[row, :length] = 1
        labels = self.task.label_tensors(features, seqlen) if labelled else {}
        device = next(self.model.parameters()).device
        inputs = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask, **labels}
        return {
            name: value if name.endswith("mask") else value.to(device, non_blocking=True)
            for name, value in inputs.items()
        }


def _plain(tokenizer):
    tokenizer.no_padding()
    return tokenizer


def finetune(settings, progress=None):
    """Trains, judges and saves as ``settings`` say; returns (:class:`Tuned`, figures).
    ``progress(done, steps, loss)`` is called after each step.

    Raises:
        DataError, CheckpointError, ValueError: before training begins, naming what is wrong.
    """
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
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = _plain(load_tokenizer(settings.model))
    tuned = Tuned(task, model.to(device).train(), tokenizer, settings.max_length)
    task.check(test)  # before any time is spent
    began = time.perf_counter()
    steps = _train(settings, tuned, tuned.features(rows), rng, progress or (lambda *_: None))
    seconds = time.perf_counter() - began
    predictions = tuned.predict(test)
    figures = task.judge(test, predictions)
    figures |= {"test_rows": len(test), "train_rows": len(rows), "steps": steps}
    _save(settings, tuned, figures | {"training_seconds": seconds}, test, predictions)
    return tuned, figures


def _read(task, path, targets):
    return task.read(path) if targets is None else task.read_aligned(path, targets)


def _train(settings, tuned, features, rng, progress):
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
    for done, some in enumerate((batch for epoch in epochs for batch in epoch), 1):
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
        progress(done, steps, loss.item())
    return steps


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


def _save(settings, tuned, figures, test, predictions):
    out = Path(settings.out)
    tuned.model.save_pretrained(out)
    tuned.task.save(out)
    tuned.tokenizer.no_truncation()
    with atomic_path(out / "tokenizer.json") as path:
        tuned.tokenizer.save(str(path))
    with atomic_path(out / "metrics.json") as path:
        whole = {"figures": figures, "settings": dataclasses.asdict(settings)}
        Path(path).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 5), layout="constrained")
    tuned.task.draw(figure.subplots(), test, predictions)
    with atomic_path(out / "test.png") as path:
        figure.savefig(path, format="png", dpi=120)


def command_finetune(args):
    """Fine-tuning for a task, judged on rows held out."""
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
    """Predictions of a fine-tuned model, a JSON object a row."""
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise ValueError(f"{out} exists; --overwrite replaces it")
    tuned = Tuned.from_pretrained(args.model, args.max_length)
    translates = isinstance(tuned.task, tasks.Translation)
    if args.beams is not None:
        if not translates or args.beams < 1:
            raise ValueError("--beams is for translation, and at least 1")
        tuned.task.beams = args.beams
    path = Path(args.rows)
    plain = path.suffix == ".txt" or (translates and path.suffix not in tasks.ROW_FORMATS)
    if plain and not isinstance(tuned.task, tasks.QuestionAnswering):
        from bert_fast.embeddings.tokenizer import read_texts

        tagging = isinstance(tuned.task, tasks.Tagging)
        examples = [tasks.Example(t.split() if tagging else t) for t in read_texts(path)]
    else:
        examples = tuned.task.read(path, labelled=False)
    with atomic_path(out) as written, open(written, "w", encoding="utf-8") as file:
        for example, prediction in zip(examples, tuned.predict(examples), strict=True):
            row = {"text": example.text, **tuned.task.row(prediction)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(examples)} rows: {out}")


def add_parsers(commands):
    from bert_fast.training.pretrain import add_options

    sub = commands.add_parser("finetune", help=command_finetune.__doc__)
    add_options(sub, Settings)
    sub.set_defaults(function=command_finetune)
    sub = commands.add_parser("predict", help=command_predict.__doc__)
    sub.add_argument("--model", required=True, help="a directory of finetune's")
    sub.add_argument("--rows", required=True, help="as for training, or .txt, a text a line")
    sub.add_argument("--out", required=True, help="a .jsonl file")
    sub.add_argument("--max-length", type=int, help="tokens a text (default 128)")
    sub.add_argument("--beams", type=int, help="translation: of the search (default 4)")
    sub.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    sub.set_defaults(function=command_predict)
