"""``bert-fast predict``: a fine-tuned model's predictions of rows."""

import json
from pathlib import Path
from typing import get_args

from bert_fast.backends import resolve_device
from bert_fast.files import atomic_path
from bert_fast.models.inference import Precision
from bert_fast.text import read_texts
from bert_fast.training import tasks
from bert_fast.training.tuned import Tuned


def command(args):
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


def add_parser(commands):
    sub = commands.add_parser("predict", help=command.__doc__)
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
    sub.set_defaults(function=command)
