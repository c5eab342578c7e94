"""The graph runner. What it decides (buckets, padding, which graph) is tested with a capture that
calls the function again; that CUDA can capture the model, on a GPU."""

import pytest
import torch

import bert_fast
from bert_fast.models.graphs import CudaGraphs, bucket

SIZES = {
    "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 40, "max_position_embeddings": 20,
}  # fmt: skip
HEADS = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification",
         "ForQuestionAnswering", "ForPreTraining", "ForNextSentencePrediction"]  # fmt: skip


def again(function):
    """In the place of a capture: a replay computes anew, into the same memory."""
    outputs = function()

    def replay():
        for kept, new in zip(outputs, function(), strict=True):
            if kept is not None:
                kept.copy_(new)

    return replay, outputs


def build(head="Model", **changes):
    model = getattr(bert_fast, f"Bert{head}")(bert_fast.BertConfig(**(SIZES | changes)))
    return model.eval()


def batch(lengths, longest=None):
    longest = longest or max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(1, 50, mask.shape), mask, torch.randint(2, mask.shape)


def check(runner, model, inputs):
    """The same results; at padding, where nobody reads, anything."""
    found, wanted = runner(*inputs), model(*inputs)
    assert type(found) is type(wanted)
    mask = inputs[1]
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.shape == b.shape
            if mask is not None and b.shape[:2] == mask.shape:
                a, b = a[mask.bool()], b[mask.bool()]
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return found


def test_buckets():
    buckets = [bucket(n) for n in range(1, 2000)]
    assert buckets == sorted(buckets)
    assert sorted(set(buckets))[:9] == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert all(
        n <= b <= max(1, 1.5 * n - 0.5) for n, b in zip(range(1, 2000), buckets, strict=True)
    )
    assert bucket(0) == 1


@pytest.mark.parametrize("head", HEADS)
def test_the_models_results(head):
    model = build(head)
    runner = CudaGraphs(model, capture=again)
    with torch.no_grad():
        for lengths in ([5, 2, 9], [1], [9, 9, 9, 9, 9], [3, 0, 20]):
            check(runner, model, batch(lengths))
        ids, _, types = batch([7, 7])
        check(runner, model, (ids, None, types))
        check(runner, model, (ids, None, None))


def test_widths_that_look_like_lengths():
    """A result is cut by what its dimensions mean, not by their sizes."""
    model = build(hidden_size=12, num_attention_heads=2)  # 12 is a bucket of lengths, too
    with torch.no_grad():
        check(CudaGraphs(model, capture=again), model, batch([11, 3]))


def test_results_are_the_callers():
    """The next call does not change them."""
    model = build()
    runner = CudaGraphs(model, capture=again)
    first = runner(*batch([5, 2]))
    kept = first.last_hidden_state.clone()
    runner(*batch([5, 2]))
    assert torch.equal(first.last_hidden_state, kept)


def test_a_graph_for_each_bucket_and_the_latest_kept():
    runner = CudaGraphs(build(), max_graphs=2, capture=again)
    for lengths in ([5, 3], [6, 1], [5, 2]):  # one bucket of batch, length, tokens
        runner(*batch(lengths))
    assert runner.captured == 1
    runner(*batch([16, 16]))
    runner(*batch([5, 3]))
    assert runner.captured == 2
    runner(*batch([1]))  # the third: [16, 16] goes
    runner(*batch([5, 3]))
    assert runner.captured == 3
    runner(*batch([16, 16]))
    assert runner.captured == 4
    assert len(runner.graphs) == 2


def test_weights_may_change_in_place():
    model = build()
    runner = CudaGraphs(model, capture=again)
    inputs = batch([5, 2])
    runner(*inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        check(runner, model, inputs)
    assert runner.captured == 1


def test_what_does_not_fit_is_said():
    model = build()
    with pytest.raises(ValueError, match="model must be on a CUDA device, not on cpu"):
        bert_fast.cudagraph(model)
    with pytest.raises(TypeError, match="model must be one of bert_fast's, not Linear"):
        bert_fast.cudagraph(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="max_graphs must be at least 1"):
        CudaGraphs(model, 0, again)
    runner = CudaGraphs(model, capture=again)
    ids, mask, _ = batch([5, 2])
    with pytest.raises(ValueError, match=r"attention_mask must have input_ids' shape \(2, 5\)"):
        runner(ids, mask[:1])
    with pytest.raises(ValueError, match=r"input_ids must be a \(batch, seqlen\) tensor"):
        runner(ids[0])
    with pytest.raises(ValueError, match="21 tokens a sequence; the model has 20 positions"):
        runner(*batch([21]))
    with pytest.raises(ValueError, match="attention_mask must hold ones and zeros"):
        runner(ids, 2 * mask)
    model.train()
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        runner(ids, mask)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU; its logic ran without one"
)
@pytest.mark.parametrize("head", HEADS)
def test_captured(head):
    model = build(head, hidden_size=96, intermediate_size=160).cuda()
    runner = bert_fast.cudagraph(model)
    with torch.no_grad():
        for lengths in ([5, 2, 9], [1], [9, 9, 9, 9, 9], [5, 2, 9]):
            check(runner, model, [t.cuda() for t in batch(lengths)])
    assert runner.captured == 3
