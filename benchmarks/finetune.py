"""Fine-tuning on real data, ours beside Hugging Face's model: the same rows, batches, optimizer,
schedule and seeds, by the same code; only the model differs. Figures on rows held out, seconds of
training; the bar is a mean within one standard deviation of theirs, in at most 0.75 of their time.

python -m benchmarks.finetune [--seeds 0 1 2] [--json FILE]
"""

import argparse
import json
import statistics
import tempfile
import warnings
from pathlib import Path

import transformers

from bert_fast.bench import data, report
from bert_fast.training import tasks
from bert_fast.training.finetune import Settings, finetune

OURS, THEIRS = "ours", "hugging_face"


def sentiment():
    """2,400 reviews to learn from, and all of a tenth of the films, other ones, to judge by."""
    rows = data.reviews()
    held_out = set(sorted({film for film, _, _ in rows})[::10])
    train = [row for row in rows if row[0] not in held_out][::4][:2400]
    test = [row for row in rows if row[0] in held_out]
    return [[{"text": t, "label": label} for _, t, label in part] for part in (train, test)]


def regression():
    rows = [{"text": text, "label": rating} for text, rating in data.rated_reviews()]
    return rows[::4][:2400], rows[1::8]


def tagging():
    """Documents that differ; Brown's tags without what comes after a hyphen (titles, headlines)."""
    documents = data.brown()
    return [
        [
            {"words": [w for w, _ in s], "tags": [t.split("-")[0] or t for _, t in s]}
            for document in part for s in document
        ]
        for part in (documents[::20], documents[10::50])
    ]  # fmt: skip


# rows, task, Hugging Face's head, settings
WORKS = {
    "sentiment of film reviews": (sentiment, "sentiment", "SequenceClassification", {"lr": 1e-4}),
    "ratings of film sentences": (
        regression, "regression", "SequenceClassification", {"lr": 1e-4, "epochs": 2},
    ),
    "Brown's parts of speech": (tagging, "ner", "TokenClassification", {"lr": 5e-4, "epochs": 2}),
}  # fmt: skip


def theirs(kind, head):
    """The task with Hugging Face's model in the place of ours."""

    class Theirs(kind):
        def new_model(self, directory):
            auto = getattr(transformers, f"AutoModelFor{head}")
            return auto.from_pretrained(
                directory, problem_type=self.problem_type, dtype="float32",
                id2label=dict(enumerate(self.labels)), attn_implementation="sdpa",
                label2id={label: i for i, label in enumerate(self.labels)},
            )  # fmt: skip

    return Theirs


def measure(name, seeds, scratch):
    rows, task, head, settings = WORKS[name]
    paths = {}
    for part, some in zip(("train", "test"), rows(), strict=True):
        paths[part] = str(scratch / f"{part}.jsonl")
        Path(paths[part]).write_text("".join(json.dumps(r) + "\n" for r in some), encoding="utf-8")
    tasks.TASKS[THEIRS] = theirs(tasks.TASKS[task], head)
    runs = {OURS: [], THEIRS: []}
    for seed in seeds:
        for who, kind in ((OURS, task), (THEIRS, THEIRS)):
            out = scratch / f"{who}-{seed}"
            finetune(Settings(task=kind, model=str(data.minilm()), out=str(out), seed=seed,
                              device="cpu", keep="last", **paths, **settings))  # fmt: skip
            figures = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["figures"]
            runs[who].append(figures)
            print(f"  seed {seed}, {who}: {figures}", flush=True)
    figure = next(iter(runs[OURS][0]))
    found = {who: [run[figure] for run in several] for who, several in runs.items()}
    seconds = {who: sum(r["training_seconds"] for r in several) for who, several in runs.items()}
    return {
        "work": name, "figure": figure, "seeds": seeds, "runs": runs,
        "mean": {who: statistics.mean(values) for who, values in found.items()},
        "deviation": {who: statistics.stdev(values) for who, values in found.items()},
        "time": seconds[OURS] / seconds[THEIRS],
    }  # fmt: skip


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="two at least")
    options.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK")
    options.add_argument("--json", help="also write the result here, beside other works' rows")
    args = options.parse_args()
    warnings.filterwarnings("ignore", message=".*newly initialised")
    transformers.logging.set_verbosity_error()
    result = {"environment": report.environment(), "rows": []}
    if args.json and Path(args.json).exists():
        rows = json.loads(Path(args.json).read_text(encoding="utf-8"))["rows"]
        result["rows"] = [row for row in rows if row["work"] not in args.works]
    for name in args.works:
        with tempfile.TemporaryDirectory() as scratch:
            row = measure(name, args.seeds, Path(scratch))
        result["rows"].append(row)
        ours, other = (f"{row['mean'][w]:.4f} ± {row['deviation'][w]:.4f}" for w in (OURS, THEIRS))
        print(
            f"{name}: {row['figure']} {ours}, Hugging Face {other}; {row['time']:.2f} of its time"
        )
        if args.json:
            report.write(args.json, result)


if __name__ == "__main__":
    main()
