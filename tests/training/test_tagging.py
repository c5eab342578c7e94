"""Entities by their schemes of tags, as seqeval scores them."""

import random

import numpy as np
import pytest

from bert_fast.training import tasks


@pytest.mark.parametrize("scheme", ["BIO", "BIOES", "BILOU"])
def test_entities_are_seqevals(scheme):
    """Of drawn tags, which do not all make sense: the F1 of seqeval, where L is E and U is S."""
    from seqeval.metrics import f1_score

    heads = [head for head in scheme if head != "O"]
    tags = ["O", *(f"{head}-{kind}" for head in heads for kind in ("x", "y-z"))]
    truth, guess = ([random.choices(tags, k=12) for _ in range(40)] for _ in range(2))
    guess = [t if random.random() < 0.5 else g for t, g in zip(truth, guess, strict=True)]
    task = tasks.Tagging()
    examples = [tasks.Example(t, None, t) for t in truth]
    task.fit(examples)

    def named(rows):
        return [[{"L": "E", "U": "S"}.get(tag[0], tag[0]) + tag[1:] for tag in row] for row in rows]

    wanted = f1_score(named(truth), named(guess), average="micro")
    assert np.isclose(task.judge(examples, guess)["entity_f1"], wanted)


def test_a_scheme_that_is_not_scored_is_refused():
    with pytest.raises(tasks.DataError, match="the tags have B-x, and 'Q-x': entities are scored"):
        tasks.Tagging().fit([tasks.Example(["a", "b"], None, ["B-x", "Q-x"])])
    tasks.Tagging().fit([tasks.Example(["a", "b"], None, ["NN", "Q-x"])])  # parts of speech
