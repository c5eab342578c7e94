"""The graph runner. What it decides (buckets, padding, which graph) is tested with a capture that
calls the function again; that CUDA can capture the model, on a GPU."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bert_fast
from bert_fast.models import graphs
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


def accelerated(family="Bert", head="Model", **config):
    import transformers

    sizes = SIZES if family != "DistilBert" else dict(
        vocab_size=50, dim=24, n_layers=2, n_heads=3, hidden_dim=40, max_position_embeddings=20
    )  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**sizes, **config)
    theirs = getattr(transformers, f"{family}{head}")(config).eval()
    return theirs, bert_fast.accelerate(copy.deepcopy(theirs))


def check_theirs(runner, theirs, lengths, types=False, atol=2e-5, **wanted_of):
    """What transformers' own model gives: class, names, shapes, numbers at real tokens."""
    ids, mask, kinds = batch(lengths)
    pad = theirs.config.pad_token_id
    ids = (ids + 2).clamp(max=49).masked_fill(mask == 0, pad)  # RoBERTa's first two mean something
    device = next(theirs.parameters()).device
    given = {"token_type_ids": kinds} if types else {}
    found = runner(ids, mask, **given)
    with torch.no_grad():
        wanted = theirs(
            ids.to(device), mask.to(device), **{k: v.to(device) for k, v in given.items()}
        )
    assert type(found) is type(wanted)
    assert found.keys() == wanted.keys()
    for name in wanted:
        every = ((v if isinstance(v, tuple) else (v,)) for v in (found[name], wanted[name]))
        for a, b in zip(*every, strict=True):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            if b.shape[:2] == mask.shape:
                a, b = a[mask.bool()], b[mask.bool()]
            torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)
    return found


FAMILIES = ["Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert"]


@pytest.mark.parametrize("family", FAMILIES)
def test_accelerated_families(family):
    theirs, ours = accelerated(family)
    runner = CudaGraphs(ours, capture=again)
    for lengths in ([5, 2, 9], [1], [9, 9], [3, 1, 18 if "Bert" not in family[1:] else 20]):
        check_theirs(runner, theirs, lengths)
    assert runner.captured == len(runner.graphs) == 4
    if family in ("Bert", "Electra"):
        check_theirs(runner, theirs, [5, 2], types=True)
    if family == "DistilBert":
        with pytest.raises(TypeError, match="DistilBertModel takes no token_type_ids"):
            runner(*batch([3, 1]))


@pytest.mark.parametrize(
    "head", ["ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering"]
)
def test_accelerated_heads(head):
    theirs, ours = accelerated("Bert", head, output_hidden_states=True)
    runner = CudaGraphs(ours, capture=again)
    for lengths in ([5, 2, 9], [7]):
        check_theirs(runner, theirs, lengths)
    assert runner.captured == 2


def test_a_bucket_is_captured_at_the_use_that_is_said():
    theirs, ours = accelerated()
    runner = CudaGraphs(ours, capture=again, capture_at=2)
    for lengths, captured in (([5, 2], 0), ([16, 16], 0), ([6, 1], 1), ([5, 1], 1), ([16, 15], 2)):
        check_theirs(runner, theirs, lengths)
        assert runner.captured == captured


def replaced_parameter(model):
    linear = model.get_submodule(LINEAR[type(model).__name__, bert_fast_own(model)])
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 1.5)


def replaced_module(model):
    path = LINEAR[type(model).__name__, bert_fast_own(model)]
    linear = model.get_submodule(path)
    new = type(linear)(linear.in_features, linear.out_features)
    new.load_state_dict({k: 1.5 * v for k, v in linear.state_dict().items()})
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def other_memory(model):
    model.to(torch.bfloat16)


def other_eps(model):
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.LayerNorm))
    norm.eps = 0.5


def hooked(model):
    path = LINEAR[type(model).__name__, bert_fast_own(model)].rpartition(".")[0]
    model.get_submodule(path).register_forward_hook(
        lambda module, args, out: tuple(2 * t for t in out) if isinstance(out, tuple) else 2 * out
    )


def bert_fast_own(model):
    return type(model).__module__.startswith("bert_fast.")


LINEAR = {("BertModel", True): "layers.1.feed_forward.up",
          ("BertModel", False): "encoder.layer.1.intermediate.dense"}  # fmt: skip


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    "change", [replaced_parameter, replaced_module, other_memory, other_eps, hooked]
)
def test_what_is_replaced_is_seen_by_the_next_call(own, change):
    """Graphs that would read what is no longer the model's are captured anew, or not used."""
    model = build() if own else accelerated()[1]
    runner, inputs = CudaGraphs(model, capture=again), batch([5, 2])
    before = runner(*inputs)[0].float()
    change(model)
    captured = runner.captured
    with torch.no_grad():
        found, wanted = runner(*inputs)[0], model(*inputs[:2], token_type_ids=inputs[2])[0]
    mask = inputs[1].bool()
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found[mask], wanted[mask], rtol=1e-4, atol=1e-5)
    assert (found - before)[mask].abs().max() > 1e-4
    assert runner.captured == captured + (change is not hooked)


def test_a_model_that_has_moved_is_said():
    """On its own it is an error; in the place of a model inside another it is called."""
    theirs, inner = accelerated()
    for model in (build(), inner):
        runner, (ids, mask, types) = CudaGraphs(model, capture=again), batch([5, 2])
        runner.device = torch.device("xpu")  # where it was
        with pytest.raises(ValueError, match="model has moved to cpu: make a new cudagraph"):
            runner(ids, mask, types)
    with torch.no_grad():
        found = graphs.Graphed(inner, runner)(ids, mask, types)[0]
        wanted = theirs(ids, mask, types)[0]
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)


def test_autocast_has_graphs_of_its_own():
    model = build()
    runner, inputs = CudaGraphs(model, capture=again), batch([5, 2])
    with torch.no_grad():
        for dtype in (None, torch.bfloat16, None):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                found, wanted = runner(*inputs)[0], model(*inputs)[0]
            assert found.dtype == wanted.dtype
            mask = inputs[1].bool()
            torch.testing.assert_close(found[mask], wanted[mask])
    assert runner.captured == 2


def test_several_threads():
    model = build()
    runner = CudaGraphs(model, max_graphs=3, capture=again)
    every = [batch([n, 2]) for n in range(2, 12)] * 5
    with ThreadPoolExecutor(4) as pool:
        for inputs, found in zip(every, pool.map(lambda i: runner(*i), every), strict=True):
            with torch.no_grad():
                wanted = model(*inputs)
            mask = inputs[1].bool()
            torch.testing.assert_close(found[0][mask], wanted[0][mask], rtol=1e-4, atol=1e-5)


def test_a_capture_that_fails_is_said():
    def broken(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    runner = CudaGraphs(build(), capture=broken)
    with pytest.raises(RuntimeError, match="cudagraph cannot capture BertModel: operation not"):
        runner(*batch([5, 2]))


def test_a_mask_elsewhere_is_counted_there(monkeypatch):
    """Its bucket is that of its real tokens."""
    model, reads = build(), []
    runner, inputs = CudaGraphs(model, capture=again), batch([16, 1, 1, 1])

    def look_at(mask, _function=graphs.look_at):
        reads.append(mask)
        return _function(mask)

    monkeypatch.setattr(graphs, "is_on_host", lambda tensor: False)
    monkeypatch.setattr(graphs, "look_at", look_at)
    check(runner, model, inputs)
    assert len(reads) == 1
    assert next(iter(runner.graphs))[:3] == (4, 16, bucket(19))
    with pytest.raises(ValueError, match="attention_mask must hold ones and zeros"):
        runner(inputs[0], 2 * inputs[1])


def test_what_is_not_accelerated_or_cannot_be():
    import transformers

    theirs, _ = accelerated()
    mpnet = bert_fast.accelerate(transformers.MPNetModel(transformers.MPNetConfig(**SIZES)))
    for model in (theirs, mpnet, torch.nn.Sequential(theirs)):
        with pytest.raises(TypeError, match=f"not {type(model).__name__}; or .* .but MPNet"):
            bert_fast.cudagraph(model)


def test_in_the_place_of_a_model_inside_another():
    """What cudagraph puts into a SentenceTransformer; a call with gradients goes past it."""
    theirs, ours = accelerated("Bert", "Model")
    runner = CudaGraphs(ours, capture=again)
    outer = torch.nn.Sequential(ours)
    copied = graphs._with(outer, ours, graphs.Graphed(ours, runner))
    assert outer[0] is ours
    assert copied[0].config is ours.config
    ids, mask, types = batch([5, 2])
    with torch.no_grad():
        found = copied[0](ids, mask, types, return_dict=True)
    wanted = theirs(ids, mask, types)
    torch.testing.assert_close(found[0][mask.bool()], wanted[0][mask.bool()], rtol=1e-4, atol=1e-5)
    assert runner.captured == 1
    copied[0](ids, mask)[0].sum().backward()
    with torch.no_grad():
        hidden = copied[0](ids, mask, output_hidden_states=True).hidden_states
    assert len(hidden) == 3
    assert runner.captured == 1
    assert ours.encoder.layer[0].intermediate.dense.weight.grad is not None


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


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU; its logic ran without one"
)
class TestOnAGpu:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_accelerated_families(self, family):
        theirs, ours = (model.cuda() for model in accelerated(family))
        runner = bert_fast.cudagraph(ours)
        for lengths in ([5, 2, 9], [1], [9, 9], [5, 2, 9]):
            check_theirs(runner, theirs, lengths)
        assert runner.captured == 3

    @pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification"])
    def test_accelerated_heads(self, head):
        theirs, ours = (model.cuda() for model in accelerated("Bert", head))
        runner = bert_fast.cudagraph(ours)
        for lengths in ([5, 2, 9], [7], [5, 2, 9]):
            check_theirs(runner, theirs, lengths)

    def test_threads_with_streams_of_their_own(self):
        model = build().cuda()
        runner = bert_fast.cudagraph(model, max_graphs=3)
        every = [batch([n, 2]) for n in range(2, 12)] * 5

        def run(inputs):
            with torch.cuda.stream(torch.cuda.Stream()):
                return runner(*inputs)[0].cpu()

        with ThreadPoolExecutor(4) as pool:
            for inputs, found in zip(every, pool.map(run, every), strict=True):
                with torch.no_grad():
                    wanted = model(*(t.cuda() for t in inputs))[0].cpu()
                mask = inputs[1].bool()
                torch.testing.assert_close(found[mask], wanted[mask], rtol=1e-4, atol=1e-4)
