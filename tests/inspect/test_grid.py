"""What whole launches lose, against the same counted tile by tile."""

import numpy as np
import pytest
import torch

from bert_fast.inspect import CHIPS, grid


@pytest.fixture
def rng():
    return np.random.default_rng(torch.randint(2**31, ()).item())


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("by_keys", [False, True], ids=["queries", "keys"])
def test_tiles_lost_to_ragged_ends(rng, by_keys, causal):
    """Every tile that has a score is computed in full."""
    rows, cols = (int(rng.choice([16, 32, 64, 128])) for _ in range(2))
    lengths, heads = rng.integers(1, 400, 6).tolist(), int(rng.integers(1, 4))
    computed = needed = 0
    for n in lengths:
        seen = np.tril(np.ones((n, n), bool)) if causal else np.ones((n, n), bool)
        seen = seen.T if by_keys else seen  # the CTA's side first
        tiles = np.pad(seen, [(0, -n % rows), (0, -n % cols)])
        tiles = tiles.reshape(-(-n // rows), rows, -(-n // cols), cols).any((1, 3))
        computed += tiles.sum() * rows * cols * heads
        needed += seen.sum() * heads
    found = grid.attention(90, lengths, heads, rows, cols, by_keys, causal)
    assert found.turns * rows * cols == computed
    assert found.ragged == pytest.approx(1 - needed / (found.turns * rows * cols))
    assert 0 <= found.idle < 1


def test_the_last_wave(rng):
    """Equal CTAs go in whole waves; of drawn ones the end lies between the two bounds of any list
    (Graham 1969)."""
    for chip, board in CHIPS.items():
        waves, extra, cost = rng.integers(0, 5), rng.integers(1, board.sms), int(rng.integers(1, 9))
        _, last = grid.spread([cost] * int(waves * board.sms + extra), chip)
        assert last == cost * (waves + 1)
        costs = rng.integers(1, 50, rng.integers(1, 2000)).tolist()
        every, last = grid.spread(costs, chip)
        assert every == sum(costs)
        assert max(max(costs), every / board.sms) <= last <= every / board.sms + max(costs)


def test_rows(rng):
    """Where programs take the rows in turn, one that has an extra turn is waited for."""
    tile, ctas, turns = 4 * 768, int(rng.integers(1, 500)), int(rng.integers(1, 9))
    rows = 4 * (ctas * (turns - 1) + 1)
    found = grid.of_rows(90, rows * 768, tile, ctas)
    assert found.turns == ctas * turns
    assert found.useful == pytest.approx(rows * 768 / (ctas * turns * tile))
