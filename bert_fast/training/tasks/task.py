"""What every task has in common: its examples, its features, and the steps from rows to figures."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from bert_fast.models import heads
from bert_fast.text import DataError, read_rows, text_of
from bert_fast.training.models import load_model
from bert_fast.training.tasks.figures import accuracy_and_f1, draw_confusion

SINGLE = "single_label_classification"


class Example(NamedTuple):
    """text: a text, a list of words (tagging), or a question. pair: the second text, or the
    context. label: as the file has it; None where there is none."""

    text: object
    pair: str | None = None
    label: object = None


class Feature(NamedTuple):
    """Tokens of an example, or of a window of it. label: numbers. encoding: the tokenizer's."""

    ids: list
    types: list
    label: object
    example: int
    encoding: object


class Task:
    """``labels``: the names in the order of their numbers, once :meth:`fit` has seen the training
    rows, or None where the task has none. ``class_weights``: of each label, or None."""

    model: type = heads.BertForSequenceClassification
    problem_type: str | None = None
    labels: list | None = None
    has_classes = False  # whether one label of several is right, of a text or of a word
    class_weights: list | None = None
    epochs, lr = 3, 5e-5  # Devlin et al. 2019, appendix A.3

    def configure(self, settings):
        """Takes what a run's settings say of this task alone."""

    def read(self, path, labelled=True):
        """The examples of a file.

        Raises:
            DataError: naming file and line.
        """
        examples = [
            Example(
                text_of(path, number, row), text_of(path, number, row, "text_b", needed=False),
                self.label(path, number, row) if labelled else None,
            )
            for number, row in read_rows(path)
        ]  # fmt: skip
        if not examples:
            raise DataError(f"{path} has no rows")
        return examples

    def fit(self, examples):
        self.labels = sorted({example.label for example in examples})

    def fitted(self):
        """What :meth:`fit` found out, for a checkpoint and for other processes."""
        return {"labels": self.labels}

    def take(self, fitted):
        """Takes that in the place of :meth:`fit`."""
        self.labels = fitted["labels"]

    def truth(self, examples):
        """The labels of all that has one."""
        return [example.label for example in examples]

    def number(self, label):
        """Of a label's name."""
        if label not in self.labels:
            known = ", ".join(map(str, self.labels[:8]))
            raise DataError(f"the label {label!r} is not one of the training rows': {known}")
        return self.labels.index(label)

    def check(self, examples):
        """Raises a DataError where rows to judge by have labels that training lacks."""
        for example in examples:
            self.target(example)

    def new_model(self, directory):
        """The model to be trained: a checkpoint's encoder, a new head."""
        changes = {"problem_type": self.problem_type}
        if self.labels is not None:
            changes["id2label"] = dict(enumerate(map(str, self.labels)))
        return load_model(self.model, Path(directory), **changes)

    def save(self, directory):
        """What belongs to a fine-tuned model beside its weights and its tokenizer."""

    def load(self, directory, config):
        """Takes that back, and the model's config."""
        if config.id2label is not None:
            self.labels = [config.id2label[i] for i in sorted(config.id2label)]

    def tokens(self, feature):
        """How many a feature adds to a batch."""
        return len(feature.ids)

    def weight(self, feature):
        """How much of the mean that is a batch's loss is a feature's."""
        return 1.0 if self.class_weights is None else self.class_weights[feature.label]

    def loss(self, model, inputs):
        """A batch's mean loss: the model's own, or with class weights cross-entropy's, which is
        divided by the sum of the labels' weights."""
        if self.class_weights is None:
            return model(**inputs).loss
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        logits = model(**inputs).logits.float().flatten(0, -2)
        return F.cross_entropy(logits, labels.flatten(), logits.new_tensor(self.class_weights))

    def features(self, tokenizer, examples, max_length, side="right"):
        """``side``: where texts are cut that are longer than ``max_length``."""
        tokenizer.enable_truncation(max_length, direction=side)
        pairs = [e.text if e.pair is None else (e.text, e.pair) for e in examples]
        return [
            Feature(encoding.ids, encoding.type_ids, self.target(examples[i]), i, encoding)
            for i, encoding in enumerate(tokenizer.encode_batch(pairs))
        ]

    def target(self, example):
        return None if example.label is None else self.number(example.label)

    def label_tensors(self, features, seqlen):
        """The model's labels for a batch."""
        return {"labels": torch.tensor([feature.label for feature in features])}

    def predictions(self, examples, features, outputs):
        """A prediction an example: (label, {label: score})."""
        found = []
        for (logits,) in outputs:
            scores = torch.softmax(logits, -1).tolist()
            best = int(np.argmax(scores))
            found.append((self.labels[best], dict(zip(self.labels, scores, strict=True))))
        return found

    def run(self, model, inputs, lengths):
        """A batch's results, one a feature of so many tokens."""
        return self.outputs(model(**inputs), lengths)

    def outputs(self, out, lengths):
        """A batch's result, cut up by feature."""
        return [(logits,) for logits in out.logits.float().cpu()]

    def judge(self, examples, predictions):
        """Figures of predictions against the examples' labels, the most important first."""
        truth, guess = [e.label for e in examples], [p[0] for p in predictions]
        return accuracy_and_f1(truth, guess)

    def row(self, prediction):
        """A prediction as a JSON object."""
        label, scores = prediction
        return {"label": label, "scores": scores}

    def draw(self, axes, examples, predictions):
        draw_confusion(axes, self.labels, [e.label for e in examples], [p[0] for p in predictions])
