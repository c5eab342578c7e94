"""A run's figures: ``metrics.jsonl``, and their curves."""

import json

from bert_fast.extras import can_draw
from bert_fast.files import atomic_path


def read_metrics(path, steps):
    """The records of the first steps; what a killed run wrote after them is left out."""
    records = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if len(records) == steps:
                break
            records.append(json.loads(line))
    return records


def plot(records, path):
    """The curves as a PNG; without matplotlib a warning."""
    if not can_draw(path):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    every = records[:: max(1, len(records) // 2000)]
    steps = [record["step"] for record in every]
    tested = [record for record in records if "held_out_masked_lm_loss" in record]
    for axes, what, name in (
        (loss, "masked_lm_loss", "masked words, nats"),
        (accuracy, "masked_lm_accuracy", "masked words"),
        (accuracy, "next_sentence_accuracy", "next sentence"),
    ):
        if records and what not in records[0]:
            continue  # masked words alone
        (line,) = axes.plot(steps, [record[what] for record in every], alpha=0.5, lw=0.8)
        axes.plot(
            [record["step"] for record in tested], [r[f"held_out_{what}"] for r in tested],
            "o-", ms=3, color=line.get_color(), label=f"{name}, held out",
        )  # fmt: skip
    if tested:
        loss.axhline(tested[-1]["unigram_entropy"], ls=":", color="gray", label="unigram entropy")
    for axes, title in ((loss, "loss"), (accuracy, "accuracy")):
        axes.set(title=title, xlabel="step")
        axes.legend(frameon=False)
    with atomic_path(path) as written:
        figure.savefig(written, format="png", dpi=120)
