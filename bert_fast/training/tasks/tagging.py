"""A tag for each word: named entities, parts of speech."""

import collections
from pathlib import Path

import numpy as np
import torch

from bert_fast.models import heads
from bert_fast.ops.cross_entropy import IGNORED
from bert_fast.text import DataError, read_rows
from bert_fast.training.tasks.conll import read_conll
from bert_fast.training.tasks.figures import draw_confusion
from bert_fast.training.tasks.task import Example, Feature, Task

# Parts of an entity: begin, inside, end, single; BIO, BIOES, BILOU and BMES by the same four.
SCHEME = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S"}


class Tagging(Task):
    """A tag a word: CoNLL's form, or JSONL with ``words`` and ``tags``. A word's first token
    carries its tag. Tags B-x and the like (:data:`SCHEME`) are
    judged as entities, others a word at a time."""

    model = heads.BertForTokenClassification
    has_classes = True

    def read(self, path, labelled=True):
        path = Path(path)
        if path.suffix == ".jsonl":
            examples = self._jsonl(path, labelled)
        else:
            found = read_conll(path, labelled)
            examples = [Example(words, None, tags) for words, tags in found]
        if not examples:
            raise DataError(f"{path} has no rows")
        return examples

    def _jsonl(self, path, labelled):
        examples = []
        for number, row in read_rows(path):
            words, tags = row.get("words"), row.get("tags") if labelled else None
            for name, value in (("words", words), ("tags", tags)):
                if name == "tags" and not labelled:
                    continue
                if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
                    raise DataError(f"{path}:{number}: {name!r} must be a list of texts")
            if labelled and len(words) != len(tags):
                raise DataError(f"{path}:{number}: {len(words)} words, but {len(tags)} tags")
            examples.append(Example(words, None, tags))
        return examples

    def fit(self, examples):
        self.labels = sorted({tag for example in examples for tag in example.label})
        odd = [t for t in self.labels if t != "O" and not (t[0] in SCHEME and t[1:2] == "-")]
        if odd and any(tag.startswith("B-") for tag in self.labels):
            raise DataError(f"the tags have B-x, and {odd[0]!r}: entities are scored by the "
                            "schemes BIO, BIOES, BILOU and BMES, with O")  # fmt: skip

    def truth(self, examples):
        return [tag for example in examples for tag in example.label]

    def weight(self, feature):
        tags = [tag for tag in feature.label if tag != IGNORED]
        return (
            float(len(tags))
            if self.class_weights is None
            else sum(self.class_weights[tag] for tag in tags)
        )

    def features(self, tokenizer, examples, max_length, side="right"):
        """Long examples go by windows that overlap by a third: none is cut, on no side."""
        room = max_length - tokenizer.num_special_tokens_to_add(False)
        tokenizer.enable_truncation(max_length, stride=room // 3)
        encodings = tokenizer.encode_batch([e.text for e in examples], is_pretokenized=True)
        return [
            Feature(e.ids, e.type_ids, self._target(examples[i], e), i, e)
            for i, whole in enumerate(encodings)
            for e in (whole, *whole.overflowing)
        ]

    def check(self, examples):
        """A tag that training never saw cannot be right, but is no reason to stop."""

    def _target(self, example, encoding):
        if example.label is None:
            return None
        target = [IGNORED] * len(encoding.ids)
        for place, word in _first_tokens(encoding):
            tag = example.label[word]
            target[place] = self.labels.index(tag) if tag in self.labels else IGNORED
        return target

    def label_tensors(self, features, seqlen):
        rows = [f.label + [IGNORED] * (seqlen - len(f.label)) for f in features]
        return {"labels": torch.tensor(rows)}

    def outputs(self, out, lengths):
        best = out.logits.argmax(-1).cpu()
        return [(row[:length],) for row, length in zip(best, lengths, strict=True)]

    def predictions(self, examples, features, outputs):
        """A tag a word, from the window in which it is farthest from an edge: O, or the first of
        all tags, for words that the tokenizer makes nothing of."""
        nothing = "O" if "O" in self.labels else self.labels[0]
        found = [[nothing] * len(example.text) for example in examples]
        farthest = [[-1] * len(example.text) for example in examples]
        for feature, (best,) in zip(features, outputs, strict=True):
            i = feature.example
            for place, word in _first_tokens(feature.encoding):
                if (edge := min(place, len(feature.ids) - place)) > farthest[i][word]:
                    farthest[i][word], found[i][word] = edge, self.labels[best[place]]
        return found

    def judge(self, examples, predictions):
        truth = self.truth(examples)
        guess = [tag for tags in predictions for tag in tags]
        figures = {"accuracy": float(np.mean([a == b for a, b in zip(truth, guess, strict=True)]))}
        if any(tag.startswith("B-") for tag in self.labels):
            wanted = [_entities(example.label) for example in examples]
            found = [_entities(tags) for tags in predictions]
            right = sum(len(a & b) for a, b in zip(wanted, found, strict=True))
            total = sum(map(len, wanted)) + sum(map(len, found))
            figures = {"entity_f1": 2 * right / max(total, 1), **figures}
        return figures

    def row(self, prediction):
        return {"tags": prediction}

    def draw(self, axes, examples, predictions):
        pairs = [(e.label, tags) for e, tags in zip(examples, predictions, strict=True)]
        truth, guess = ([tag for pair in pairs for tag in pair[i]] for i in (0, 1))
        common = [tag for tag, _ in collections.Counter(truth).most_common(20)]
        draw_confusion(axes, common, truth, guess)


def _first_tokens(encoding):
    """(place, word) of the first token of each word."""
    previous = None
    for place, word in enumerate(encoding.word_ids):
        # A window may begin inside of a word, whose first token is in the window before.
        inside = previous is None and encoding.offsets[place][0] > 0
        if word is not None and word != previous and not inside:
            yield place, word
        previous = word


def _entities(tags):
    """{(begin, end, kind)} of tags by :data:`SCHEME`; an I-x without its B-x begins one, as in
    CoNLL's own evaluation and in seqeval's."""
    found, begin, kind, before = set(), None, None, "O"
    for i, tag in enumerate([*tags, "O"]):
        head, _, name = tag.partition("-")
        head = SCHEME.get(head, "O")
        if begin is not None and (head in "BSO" or name != kind or before in "ES"):
            found.add((begin, i, kind))
            begin = None
        if head != "O" and begin is None:
            begin, kind = i, name
        before = head
    return found
