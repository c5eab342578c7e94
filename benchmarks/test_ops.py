"""Micro-benchmarks: ``pytest benchmarks/`` (pytest-benchmark), outside make test.

The works and contestants of ``bert-fast bench op``, small, for those who compare by pytest's own
tools (--benchmark-compare, --benchmark-autosave).
"""

import pytest
import torch

from bert_fast.bench import run, works
from bert_fast.bench.peers import Eager, Ours, Sdpa, SdpaLoop, Torch

WORKS = [works.Attention, works.LayerNorm, works.Gelu, works.LinearGelu]
PEERS = [Ours(), Eager(), Torch(), Sdpa(), SdpaLoop()]
PAIRS = [(work, peer) for work in WORKS for peer in PEERS if getattr(peer, work.kind, None)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("kind", "peer"), PAIRS, ids=[f"{w.kind}-{p.name}" for w, p in PAIRS])
def test_op(benchmark, kind, peer, backward):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work = kind(torch.float32, device, backward)
    benchmark.group = str(work)
    with torch.no_grad():
        made = getattr(peer, work.kind)(work, work.inputs(0))
        errors = run.relative_errors(made.results(backward), work.truth(), work.allowed())
        assert run.refusal(errors, work) is None
        call = made.call(backward)
        if device == "cuda":
            benchmark(lambda: (call(), torch.cuda.synchronize()))
        else:
            benchmark(call)
