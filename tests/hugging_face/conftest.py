"""What the tests of this wing share."""

import pytest

from bert_fast import ops
from bert_fast.hugging_face import families


@pytest.fixture
def attention(monkeypatch):
    """How often our attention ran; and warnings are said anew."""
    families.warn_once.cache_clear()
    calls, real = [], ops.attention

    def count(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(ops, "attention", count)
    return calls
