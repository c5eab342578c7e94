"""Around a model's layers in one call nothing starts OpenMP's threads; and the numbers are those of
a model whose layers run one by one, with them."""

import os
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bert_fast
from bert_fast import ops
from bert_fast.backends import cpu
from bert_fast.embeddings.pooling import pool

pytestmark = pytest.mark.usefixtures("two_threads")


def drawn_model():
    """Wide enough that torch would share its embeddings, its padding and its pooler's tanh."""
    config = bert_fast.BertConfig(
        vocab_size=50, hidden_size=256, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    model = bert_fast.BertModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.prepack()


def batch():
    ids = torch.randint(1, 50, (8, 40))
    return ids, (torch.arange(40) < torch.randint(15, 41, (8, 1))).long()


def forward(model, ids, mask):
    """The model's results and, as SentenceEncoder makes them, the pooled vectors."""
    with torch.inference_mode():
        out = model(ids, mask, mask)
        states, packing = model.encode(ids, mask)
        with model.one_call.around(states[-1].numel()):
            return *out[:2], pool(states[-1], packing.cu_seqlens)


def threads():
    return len(os.listdir("/proc/self/task"))


def starts_threads(run):
    """Whether run() leaves more threads than there were: OpenMP keeps those that it starts, and its
    pause ends them, some moments later."""
    run()  # the team's own stay
    with cpu.WithoutOpenMP():
        pass
    time.sleep(0.02)
    before = threads()
    run()
    patience = time.monotonic() + 2
    while threads() > before and time.monotonic() < patience:
        time.sleep(0.01)
    return threads() > before


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_no_threads_of_openmp_are_started():
    model, given = drawn_model(), batch()
    forward(model, *given)  # binds the layers
    assert not starts_threads(lambda: forward(model, *given))
    assert not starts_threads(lambda: forward(model, given[0], torch.ones_like(given[0])))
    few, mask = given[0][:3], (torch.arange(40) < torch.tensor([[40], [9], [20]])).long()
    for ids in (few, few[:1]):  # too few for a thread of torch's but by products and tanh
        assert not starts_threads(lambda ids=ids: forward(model, ids, mask[: len(ids)]))


class Threads(TorchDispatchMode):
    """Notes with how many threads torch runs its ops, but those that compute nothing."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if not op.is_view and op.overloadpacket is not torch.ops.aten.empty:
            self.seen.add(torch.get_num_threads())
        return out


def test_torch_has_one_thread_for_few_numbers():
    model, (ids, mask) = drawn_model(), batch()
    large = ids.repeat(35, 1), mask.repeat(35, 1)  # at least 35 x 8 x 15 x 256 > 2 ** 20 numbers
    for given, wanted in (((ids, mask), {2}), ((ids, mask), {1}), (large, {2})):
        with Threads() as threads:
            forward(model, *given)
        assert wanted <= threads.seen
        assert threads.seen == wanted or wanted == {2}


def test_same_bits_as_with_openmp():
    """The first call does not know yet that the layers run in one call."""
    model, given = drawn_model(), batch()
    assert model.one_call.bound[1] is None
    before = forward(model, *given)
    assert model.one_call.bound[1] is not None
    for one, other in zip(before, forward(model, *given), strict=True):
        assert torch.equal(one, other)
    hook = model.layers[0].register_forward_hook(lambda *args: None)
    for one, other in zip(before, forward(model, *given), strict=True):
        assert torch.equal(one, other)
    hook.remove()


def test_threads_are_given_back():
    def inside():
        return torch.get_num_threads(), cpu.num_threads()

    assert inside() == (2, 2)
    with ops.without_openmp():
        with ops.without_openmp():
            assert inside() == (1, 2)
        assert inside() == (1, 2)
        found = []
        other = threading.Thread(target=lambda: found.append(inside()))
        other.start()
        other.join()
        assert found == [(2, 2)]
    assert inside() == (2, 2)
    with pytest.raises(ValueError, match="holds 50"):
        forward(drawn_model(), torch.full((1, 20), 50), torch.ones(1, 20, dtype=torch.int64))
    model, (ids, mask) = drawn_model(), batch()
    forward(model, ids, mask)
    with pytest.raises(ValueError, match="holds 50"):
        forward(model, torch.full_like(ids, 50), mask)
    assert inside() == (2, 2)


def test_only_where_the_layers_run_in_one_call(monkeypatch):
    entered = []
    monkeypatch.setattr(cpu.WithoutOpenMP, "__enter__", lambda self: entered.append(1))
    monkeypatch.setattr(cpu.WithoutOpenMP, "__exit__", lambda self, *_: None)
    model, given = drawn_model(), batch()
    forward(model, *given)
    entered.clear()
    forward(model, *given)
    assert entered
    entered.clear()
    model(*given)  # with gradients
    for layer in model.modules():
        layer.packed = None
    forward(model, *given)  # finds out
    entered.clear()
    forward(model, *given)
    assert not entered
