"""A layer's time at best, from kernels whose counts are given."""

import numpy as np
import pytest
import torch

from bert_fast import cli, inspect
from bert_fast.inspect import CHIPS, Compiled, layer
from bert_fast.inspect.counts import Tile, count
from bert_fast.inspect.grid import of_work

LOOP = """
/*0000*/ LDG.E.128 R4, [R8.64] ;
/*0010*/ MUFU.EX2 R4, R4 ;
/*0020*/ @P0 BRA 0x0 ;
/*0030*/ EXIT ;
"""


@pytest.fixture
def counted(monkeypatch):
    """Every kernel takes the same turn for each tile; Triton compiles nothing."""

    def compiled(given, chips):
        for name, work, _ in given:
            sizes, kernel = {"BLOCK_M": 64, "BLOCK_N": 32}, f"{work.kind}.forward"
            tile = Tile(64 * 32, 1, 2) if work.kind == "attention" else Tile(4 * work.width)
            counts = count(LOOP, chips[0], 4, tile)
            kernels = [kernel]
            if work.backward:
                kernels = [f"{work.kind}.backward"]
                if work.kind == "attention":
                    kernels = ["attention.backward_q", "attention.backward_kv"]
            for one in kernels:
                spread = of_work(work, one, tile, sizes, chips[0], 7)
                yield Compiled(name, 0, 1, one, chips[0], 4, 32, 0, 0, "", 128, counts, spread)

    monkeypatch.setattr(layer, "compiled_cases", compiled)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_layer_is_the_sum_of_its_steps(counted, backward):
    rng = np.random.default_rng(torch.randint(2**31, ()).item())
    chip = int(rng.choice(list(CHIPS)))
    board, lengths = CHIPS[chip], rng.integers(1, 513, rng.integers(1, 200)).tolist()
    steps = layer.layer(chip, lengths, hidden=256, heads=4, intermediate=1024, backward=backward)
    tokens = sum(lengths)
    peaks = [s.us for s in steps if s.kernel == "peak"]
    shapes = [(256, 768), (256, 256), (256, 1024), (1024, 256)]
    for us, (k, n) in zip(peaks, shapes, strict=True):
        flops = 2 * tokens * k * n * (1 + backward) / board.matmul / 1e6
        moved = 2 * (1 + backward) * (tokens * (k + n) + k * n) / board.copy / 1e6
        assert us == pytest.approx(max(flops, moved))
    kernels = [s.kernel for s in steps if s.kernel != "peak"]
    assert kernels == (
        ["attention.backward_q", "attention.backward_kv", "layer_norm.backward", "gelu.backward",
         "layer_norm.backward"]
        if backward
        else ["attention.forward", "layer_norm.forward", "gelu.forward", "layer_norm.forward"]
    )  # fmt: skip
    forward = next(s for s in steps if s.name == "attention")
    pairs = sum(-(-n // 64) * -(-n // 32) for n in lengths) * 64 * 32
    assert forward.ragged == pytest.approx(1 - sum(n * n for n in lengths) / pairs)


def test_the_command_says_that_nothing_was_measured(counted, capsys):
    assert cli.main(["inspect", "--chips", "80", "--lengths", "40", "128", "9"]) == 0
    shown = capsys.readouterr().out
    assert inspect.tables.CEILING in shown
    assert "3 x 9 to 128" in shown
    assert cli.main(["inspect", "--lengths", "40", "0"]) == 1
    assert "--lengths: a sequence has 1 token or more, not 0" in capsys.readouterr().err
