"""How a graph's inputs get into its memory, and what a replay costs the host."""

import itertools
import random

import pytest
import torch
from test_graphs import again, batch, build, check
from torch.utils._python_dispatch import TorchDispatchMode

from bert_fast.models import staging
from bert_fast.models.graphs import CudaGraphs, token_bucket
from bert_fast.models.packing import as_array, count
from bert_fast.models.staging import Inputs

PAD = 7
KINDS = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16]


def wanted(values, shape):
    """Pads around ids, zeros around the others; without a mask all tokens are real."""
    place = torch.zeros(3, *shape, dtype=torch.int64)
    place[0] = PAD
    area = next(v.shape for v in values if v is not None)
    for i, value in enumerate(values):
        if value is not None:
            place[i, : area[0], : area[1]] = value
        elif i == 2:
            place[i, : area[0], : area[1]] = 1
    return place


def drawn(rng, shape, whole):
    """Ids, and perhaps types and a mask, no larger than ``shape``; some are views of more."""
    area = tuple(n if whole else rng.randint(1, n) for n in shape)
    values = []
    for i in range(3):
        kind = rng.choice(KINDS[:2] if i == 0 else KINDS)
        value = torch.randint(2 if i else 50, (area[0], 2 * area[1])).to(kind)
        value = value[:, :: rng.choice((1, 2))][:, : area[1]]
        values.append(None if i and rng.random() < 0.4 else value)
    return values, area


@pytest.mark.parametrize("where", ["here", "there", "mixed"])
def test_what_the_memory_holds(monkeypatch, where):
    """After each of many calls of any shapes: nothing of the one before is left."""
    rng, shape = random.Random(torch.initial_seed()), (3, 6)
    there = set()
    monkeypatch.setattr(staging, "is_on_host", lambda value: id(value) not in there)
    inputs = Inputs(torch.full((3, *shape), -1), PAD)
    for _ in range(60):
        values, area = drawn(rng, shape, rng.random() < 0.5)
        there.clear()
        if where != "here":
            there.update(id(v) for v in values if where == "there" or rng.random() < 0.5)
        inputs.fill(values, *area)
        assert inputs.end(None) is None
        assert torch.equal(inputs.place, wanted(values, shape))


def test_what_fails_in_between_leaves_nothing_behind():
    inputs, ids = Inputs(torch.zeros(3, 2, 4, dtype=torch.int64), PAD), torch.ones(2, 3).long()
    for _ in range(2):
        inputs.fill([ids, None, None], 2, 3)
    with pytest.raises((RuntimeError, ValueError)):
        inputs.fill([torch.ones(2, 3).long(), torch.ones(5, 9), None], 1, 2)
    for _ in range(2):
        inputs.fill([ids, None, None], 2, 3)
        assert torch.equal(inputs.place, wanted([ids, None, None], (2, 4)))


def test_no_transfer_under_way_is_written_over():
    """Transfers that take place as late as they may, when their end is waited for."""
    place, queue, arrived = torch.zeros(3, 2, 4, dtype=torch.int64), [], []

    class Late:
        shape, dtype, is_cuda = place.shape, place.dtype, False

        def copy_(self, piece, non_blocking):
            queue.append(piece)

    class End:
        jobs = 0

        def record(self, stream):
            assert stream == "the graph's"
            self.jobs = len(queue) + len(arrived)

        def synchronize(self):
            while len(arrived) < self.jobs:
                arrived.append(queue.pop(0).clone())

    inputs, sent = Inputs(place, PAD), []
    inputs.place, inputs.ends = Late(), [End(), End()]
    for n in range(9):
        sent.append([torch.full((2, 3), n), None, None])
        inputs.fill(sent[-1], 2, 3)
        inputs.end("the graph's")
        assert len(queue) == min(n + 1, 2)  # the host need not wait for the call before
    for end in inputs.ends:
        end.synchronize()
    assert len(arrived) == len(sent)
    for found, values in zip(arrived, sent, strict=True):
        assert torch.equal(found, wanted(values, (2, 4)))


NOTHING = {"as_strided", "detach", "to", "resolve_conj", "resolve_neg"}  # three are numpy()'s


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("lengths", [[5, 2, 9], [8, 8, 8]])
def test_what_a_replay_asks_torch_for(lengths):
    """One transfer, and a copy of each result: all else is done without torch."""

    def once(function):
        return (lambda: None), function()

    runner, inputs = CudaGraphs(build(), capture=once), batch(lengths)
    for given in (inputs, (inputs[0], inputs[1], None)):
        for _ in range(3):
            runner(*given)
        with Calls() as calls:
            runner(*given)
        assert [name for name in calls.names if name not in NOTHING] == ["copy_", "clone", "clone"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (0, 4), (2, 0)])
def test_count(kind, shape):
    mask = (torch.rand(shape) < 0.5).to(kind)
    assert count(mask) == int(mask.sum())
    assert count(mask.t()) == int(mask.sum())
    assert type(count(mask)) is int
    if mask.numel() and kind != torch.bool:
        for wrong in (2, -1, 3, 0.5, torch.nan):
            mask[-1, -1] = wrong if kind.is_floating_point or isinstance(wrong, int) else 2
            if kind == torch.uint8 and wrong == -1:
                assert mask[-1, -1] == 255
            with pytest.raises(ValueError, match="attention_mask must hold ones and zeros"):
                count(mask)


def test_what_is_traced_or_looked_at_has_no_array():
    class Own(torch.Tensor):
        pass

    mask = torch.ones(2, 3).long()
    assert as_array(mask) is not None
    mask[0, 0] = 5
    assert as_array(mask)[0, 0] == 5  # the same memory
    for other in (mask.as_subclass(Own), mask.float(), mask.to("meta")):
        assert as_array(other) is None

    def traced(x):
        assert as_array(x) is None
        return x + 1

    torch.jit.trace(traced, mask, check_trace=False)


def test_buckets_of_tokens():
    every = [(n, token_bucket(n)) for n in range(1025, 20000)]
    assert all(n <= b and (b - n) * 8 <= n for n, b in every)
    buckets = sorted({b for _, b in every})
    assert sum(2048 < b <= 4096 for b in buckets) == sum(8192 < b <= 16384 for b in buckets) == 8
    assert all(a < b for a, b in itertools.pairwise(buckets))
    assert [token_bucket(n) for n in (5, 700, 1024, 1025, 5325)] == [6, 768, 1024, 1152, 5632]


def test_many_tokens_have_their_own_graph():
    model = build(max_position_embeddings=400, num_hidden_layers=1)
    runner = CudaGraphs(model, capture=again)
    with torch.no_grad():
        for lengths in ([400, 380, 390, 30], [400, 400, 400, 1]):
            check(runner, model, batch(lengths))
    assert [key[2] for key in runner.graphs] == [1280]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_results_are_ordinary_tensors_in_any_mode(mode):
    runner = CudaGraphs(build(), capture=again)
    for _ in range(2):
        with mode():
            found = runner(*batch([5, 2]))[0]
        assert not found.is_inference()
        assert not found.requires_grad
        found.requires_grad_().sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_transfers_to_a_gpu():
    """With much to do in front of them there, so that the host is far ahead."""
    rng, shape = random.Random(torch.initial_seed()), (3, 6)
    inputs = Inputs(torch.full((3, *shape), -1, device="cuda"), PAD)
    busy, found, every = torch.randn(2048, 2048, device="cuda"), [], []
    for _ in range(60):
        values, area = drawn(rng, shape, rng.random() < 0.5)
        every.append(values)
        given = [v if v is None or rng.random() < 0.7 else v.cuda() for v in values]
        torch.mm(busy, busy)
        inputs.fill(given, *area)
        found.append(inputs.place.clone())
        inputs.end(torch.cuda.current_stream())
    for place, values in zip(found, every, strict=True):
        assert torch.equal(place.cpu(), wanted(values, shape))
