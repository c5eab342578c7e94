"""Labels of texts: one of many, the sentiment, or any number."""

import numpy as np
import torch

from bert_fast.text import DataError
from bert_fast.training.tasks.task import SINGLE, Task


class Classification(Task):
    """A label a text: columns ``text``, ``label``, and ``text_b`` for pairs."""

    problem_type = SINGLE
    has_classes = True

    def label(self, path, number, row):
        value = row.get("label")
        if value is None or value == "" or isinstance(value, (list, dict)):
            raise DataError(f"{path}:{number}: 'label' must be a name or a number, not {value!r}")
        return str(value)


class Sentiment(Classification):
    """A classification of short texts, by whole reviews' usual settings."""

    epochs, lr = 2, 3e-5


class MultiLabel(Task):
    """Any number of labels a text: column ``labels``, a list (JSONL) or names parted by ``|``."""

    problem_type = "multi_label_classification"

    def label(self, path, number, row):
        value = row.get("labels")
        if isinstance(value, str):
            value = [name for name in value.split("|") if name]
        if not isinstance(value, list):
            raise DataError(f"{path}:{number}: 'labels' must be a list, not {value!r}")
        return [str(name) for name in value]

    def fit(self, examples):
        self.labels = sorted({name for example in examples for name in example.label})

    def target(self, example):
        if example.label is None:
            return None
        target = [0.0] * len(self.labels)
        for name in example.label:
            target[self.number(name)] = 1.0
        return target

    def predictions(self, examples, features, outputs):
        found = []
        for (logits,) in outputs:
            scores = dict(zip(self.labels, torch.sigmoid(logits).tolist(), strict=True))
            found.append(([name for name, score in scores.items() if score > 0.5], scores))
        return found

    def judge(self, examples, predictions):
        truth = np.array([[n in e.label for n in self.labels] for e in examples])
        guess = np.array([[n in p[0] for n in self.labels] for p in predictions])
        right, wrong = (truth & guess).sum(0), (truth ^ guess).sum(0)
        f1 = 2 * right / np.maximum(2 * right + wrong, 1)
        micro = 2 * right.sum() / max(2 * right.sum() + wrong.sum(), 1)
        return {"f1_micro": float(micro), "f1_macro": float(f1.mean()),
                "exact": float((truth == guess).all(1).mean())}  # fmt: skip

    def row(self, prediction):
        return {"labels": prediction[0], "scores": prediction[1]}

    def draw(self, axes, examples, predictions):
        truth = np.array([[n in e.label for n in self.labels] for e in examples])
        guess = np.array([[n in p[0] for n in self.labels] for p in predictions])
        right, wrong = (truth & guess).sum(0), (truth ^ guess).sum(0)
        axes.barh(self.labels, 2 * right / np.maximum(2 * right + wrong, 1))
        axes.set(xlabel="F1", xlim=(0, 1))
