"""Which graphs are kept where there are more buckets than graphs."""

import itertools
import random

import pytest
import torch

import bert_fast
from bert_fast.models import graphs
from bert_fast.models.graphs import PackedGraphs, bucket


def once(function):
    """In the place of a capture; nobody looks at the numbers here."""
    return (lambda: None), function()


def runner(max_graphs, capture_at=1):
    config = bert_fast.BertConfig(
        vocab_size=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=64,
    )  # fmt: skip
    model = bert_fast.BertModel(config).eval()
    run = PackedGraphs(model, max_graphs, once, capture_at)
    run._compute = lambda *inputs: torch.zeros(1, 8)
    return run


def replays(run, lengths):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return run.replayed(torch.ones_like(mask), mask) is not None


@pytest.mark.parametrize("capture_at", [1, 2])
def test_batches_of_any_size_come_to_an_end_of_captures(capture_at):
    """Of some 95 buckets 32 are kept: those that most calls are of."""
    rng = random.Random(torch.initial_seed())
    run, captured, replayed = runner(32, capture_at), [0], []
    for _ in range(3):
        replayed.append(0)
        for _ in range(400):
            lengths = [rng.randint(3, 40) for _ in range(rng.randint(1, 8))]
            replayed[-1] += replays(run, lengths)
        captured.append(run.captured)
    first, _, last = (b - a for a, b in itertools.pairwise(captured))
    assert first > 25
    assert last < 40  # of 400 calls; some 60 to 80 where the latest used are kept
    assert last < first
    assert replayed[-1] > 280
    assert len(run.graphs) == 32


def test_buckets_in_turn():
    """The worst for the latest used: each would be let go of just before its next use."""
    run, sizes = runner(4), [1, 2, 4, 8, 16, 32]
    for _ in range(40):
        for size in sizes:
            replays(run, [size])
    assert run.captured < 30  # of 240 calls
    before = run.captured
    assert sum(replays(run, [size]) for size in sizes) >= 4
    assert run.captured <= before + 2


def test_what_is_let_go_of_counts_from_nothing():
    run = runner(1)
    key = {size: (1, bucket(size), bucket(size), None) for size in (3, 8)}
    for _ in range(5):
        assert replays(run, [3])
    assert [replays(run, [8]) for _ in range(6)] == [False] * 4 + [True] * 2
    assert key[3] not in run.uses
    assert run.uses[key[8]] == 6
    assert not any(replays(run, [3]) for _ in range(6))  # from now on by more uses
    assert replays(run, [3])
    assert run.captured == 3


def test_what_is_no_longer_used_goes(monkeypatch):
    """However often it was used before."""
    monkeypatch.setattr(graphs, "HALVED_AFTER", 40)
    run = runner(2)
    for _ in range(500):
        assert replays(run, [3])
        assert replays(run, [8])
    for _ in range(100):
        replays(run, [16])
        replays(run, [32])
    assert replays(run, [16])
    assert replays(run, [32])
    assert 4 <= run.captured <= 8


def test_a_model_that_was_changed_counts_anew():
    """One that changes all the time is not captured all the time."""
    run = runner(4, capture_at=2)
    for _ in range(5):
        run.model.layers[0].feed_forward.up.weight = torch.nn.Parameter(torch.zeros(8, 8))
        assert not replays(run, [3])
    assert run.captured == 0
    assert replays(run, [3])
