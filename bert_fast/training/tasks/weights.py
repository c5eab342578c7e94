"""Weights of classes, for labels that some rows have and many have not."""

import collections
import math

from bert_fast.text import read_json_file

BALANCED = "balanced"


def class_weights(asked, labels, truth):
    """A weight a label, in the order of ``labels``, by which cross-entropy weighs it.

    Args:
        asked: ``["balanced"]``; the path of a JSON file, alone in a list; ``"label=weight"``, any
            number of them; or a dict. A label that is not named weighs 1.
        labels: all names.
        truth: the training rows' labels. ``balanced`` weighs a label by len(truth) / (len(labels) *
            its count), as scikit-learn's ``compute_class_weight`` does.

    Raises:
        ValueError: naming the weight that is none, or the label that there is none of.
    """
    if list(asked) == [BALANCED] or asked == BALANCED:
        counts = collections.Counter(truth)
        return [len(truth) / (len(labels) * counts[label]) for label in labels]
    given = _given(asked)
    for label, weight in given.items():
        if label not in labels:
            raise ValueError(f"class_weights: {label!r} is none of the training rows' labels: "
                             f"{', '.join(labels[:8])}")  # fmt: skip
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not 0 <= weight < math.inf:
            raise ValueError(f"class_weights: {label!r} must weigh 0 or more, not {weight!r}")
    return [float(given.get(label, 1)) for label in labels]


def _given(asked):
    if isinstance(asked, dict):
        return asked
    if len(asked) == 1 and asked[0].endswith(".json"):
        given = read_json_file(asked[0])
        if not isinstance(given, dict):
            raise ValueError(f"{asked[0]} must be an object: a weight a label")
        return given
    given = {}
    for pair in asked:
        label, equals, weight = pair.rpartition("=")
        if not equals:
            raise ValueError(f"class_weights must be {BALANCED}, a .json file or label=weight, "
                             f"not {pair!r}")  # fmt: skip
        if label in given:
            raise ValueError(f"class_weights: {label!r} is given twice")
        try:
            given[label] = float(weight)
        except ValueError:
            given[label] = weight
    return given
