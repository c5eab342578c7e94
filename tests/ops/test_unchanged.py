"""What watches over what an encoder's one call has bound."""

import pytest
import torch

from bert_fast import backends, ops


@pytest.mark.parametrize("compiled", [True, False])
def test_what_says_that_nothing_changed(compiled, monkeypatch):
    """In C++, and where that is not there."""
    if not compiled:
        monkeypatch.setattr(backends, "why_unavailable", lambda name: "gone")

    class Thing:
        pass

    thing, tensor, mine = Thing(), torch.zeros(3), {"a": [], "b": []}

    def look():
        kinds = [(thing, type(thing))]
        values = [(mine, "a", mine.get("a")), (mine, "c", mine.get("c"))]
        tensors = [(tensor, tensor.data_ptr(), tensor._version)]
        return ops.unchanged(kinds, values, [(mine, list(mine.values()))], tensors)

    def set_c():
        mine["c"] = 1

    def set_a():
        mine["a"] = []

    def set_b():
        mine["b"] = []

    def become():
        thing.__class__ = type("Other", (Thing,), {})

    def move():
        tensor.data = torch.zeros(3)

    for change in (set_c, set_a, set_b, mine.clear, become, lambda: tensor.add_(1), move):
        now = look()
        assert now.hold()
        assert now.hold()
        change()
        assert not now.hold()
    assert ops.unchanged([], [(object(), "a", None)], [], []) is None
