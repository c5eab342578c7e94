"""A number for a text or a pair."""

import numpy as np

from bert_fast.text import DataError
from bert_fast.training.tasks.figures import correlation, ranks
from bert_fast.training.tasks.task import Task


class Regression(Task):
    """A number a text: columns ``text``, ``label``, and ``text_b`` for pairs."""

    problem_type = "regression"

    def label(self, path, number, row):
        try:
            value = float(row.get("label"))
        except (TypeError, ValueError):
            value = np.nan
        if not np.isfinite(value):
            raise DataError(f"{path}:{number}: 'label' must be a number, not {row.get('label')!r}")
        return value

    def fit(self, examples):
        self.labels = ["score"]

    def target(self, example):
        return example.label

    def predictions(self, examples, features, outputs):
        return [logits.item() for (logits,) in outputs]

    def judge(self, examples, predictions):
        truth, guess = np.array([e.label for e in examples]), np.array(predictions)
        return {
            "pearson": correlation(truth, guess),
            "spearman": correlation(ranks(truth), ranks(guess)),
            "mean_squared_error": float(np.square(truth - guess).mean()),
        }

    def row(self, prediction):
        return {"score": prediction}

    def draw(self, axes, examples, predictions):
        axes.plot([e.label for e in examples], predictions, ".", ms=3)
        axes.set(xlabel="label", ylabel="prediction")
