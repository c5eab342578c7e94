"""What CUDA graphs work in, and graphs of training."""

import contextlib
import copy
import gc
from unittest import mock

import pytest
import torch

import bert_fast
from bert_fast.models import graphs

on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU: only there is anything captured"
)


def test_products_of_a_capture_have_workspaces_of_their_own(monkeypatch):
    """All that torch keeps are let go of before a capture and after it, but not of the run before
    it, in another stream."""
    done = []

    @contextlib.contextmanager
    def capture(graph, pool, **options):
        done.append("capture")
        yield
        done.append("captured")

    for name in ("Stream", "current_stream", "CUDAGraph", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, mock.Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    name = "_cuda_clearCublasWorkspaces"
    monkeypatch.setattr(torch._C, name, lambda: done.append("clear"), raising=False)
    graphs._Capture()(lambda: done.append("run"))
    assert done == ["run", "clear", "capture", "run", "captured", "clear"]


@pytest.mark.gpu
@on_a_gpu
def test_what_other_graphs_leave_behind():
    """A graph of products outlives another's memory and torch's workspaces. Of a size at which
    an H200's products use one: without their own they fail there."""
    x, w = (torch.randn(n, 384, device="cuda", dtype=torch.bfloat16) for n in (21300, 1536))

    def capture():
        return graphs._Capture()(lambda: [torch.nn.functional.linear(x, w)])

    first, second = capture(), capture()
    wanted = torch.nn.functional.linear(x, w)
    del first
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # as torch.compile's graphs do
    kept = [torch.full((1 << n,), float("nan"), device="cuda") for n in range(8, 26)]
    replay, (found,) = second
    for between in (torch.cuda.synchronize, torch.cuda.empty_cache):
        between()
        found.zero_()
        replay()
        torch.cuda.synchronize()
        assert torch.equal(found, wanted)
    assert all(tensor.isnan().all() for tensor in kept)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_by_graphs(dropout):
    """The gradients of the same model without them, to the bit; dropout is drawn anew each time."""
    config = bert_fast.BertConfig(
        vocab_size=50, hidden_size=96, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=160, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    model = bert_fast.BertModel(config, add_pooling_layer=False).cuda().train()

    class Encode(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(ids, mask, capacity=60).last_hidden_state

    def draw():
        mask = torch.arange(20) < torch.tensor([20, 1, 13, 20])[torch.randperm(4), None]
        return (torch.randint(1, 50, mask.shape) * mask).cuda(), mask.cuda()

    def gradients(encode, ids, mask, dout):
        encode.zero_grad(set_to_none=True)
        states = encode(ids, mask)
        (states * mask[..., None] * dout).sum().backward()
        return [states[mask].clone(), *(p.grad.clone() for p in encode.parameters())]

    plain = Encode(copy.deepcopy(model))
    graphed = torch.cuda.make_graphed_callables(Encode(model), draw())
    for _ in range(3):
        given = *draw(), torch.randn(4, 20, 96, device="cuda")
        found = gradients(graphed, *given)
        if dropout:
            assert all(tensor.isfinite().all() for tensor in found)
            # All but the last norm's bias depend on what is dropped.
            assert sum(map(torch.equal, found, gradients(graphed, *given))) <= 1
        else:
            assert all(map(torch.equal, found, gradients(plain, *given)))
