"""A graph does again what was done once, with the memory of then: what else a model goes by is
watched, or the model has no graphs. The stand-in for a capture keeps a copy of the model."""

import copy
import itertools

import pytest
import torch
import transformers
from test_graphs import again
from torch import nn

import bert_fast
from bert_fast.models.graphs import CudaGraphs
from bert_fast.models.watch import Watch

SIZES = {
    "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3,
    "intermediate_size": 40, "max_position_embeddings": 20,
}  # fmt: skip


def runner_of(model):
    """Its captures freeze what the model is in Python, and share its tensors, as a graph does."""
    runner = CudaGraphs(model, capture=again)

    def freeze(function):
        memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
        then = copy.deepcopy(model, memo)

        def as_it_was():
            runner.model = then
            try:
                return function()
            finally:
                runner.model = model

        return again(as_it_was)

    runner.capture = freeze
    return runner


def inputs():
    lengths = torch.randint(2, 12, (3,))
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return torch.randint(3, 50, mask.shape), mask


def accelerated():
    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    return bert_fast.accelerate(model)


def own():
    return bert_fast.BertModel(bert_fast.BertConfig(**SIZES)).eval()


def agree(runner, model, given):
    ids, mask = given
    with torch.no_grad():
        found, wanted = runner(ids, mask)[0], model(ids, attention_mask=mask)[0]
    found, wanted = found[mask.bool()], wanted[mask.bool()]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.parametrize("made", [own, accelerated])
def test_what_is_captured_reads_weights_where_they_lie(made):
    """So the stand-in is good for what follows."""
    model, given = made(), inputs()
    runner = runner_of(model)
    first = agree(runner, model, given)
    other = given[0].roll(1, 0), given[1]
    assert (agree(runner, model, other) - first).abs().max() > 1e-3
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    assert (agree(runner, model, given) - first).abs().max() > 1e-3
    assert runner.captured == 1


def adapted(model):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    config = peft.LoraConfig(
        r=2, target_modules=["query", "value", "dense"], init_lora_weights=False
    )
    outer = peft.get_peft_model(model, config).eval()
    outer.add_adapter("b", config)
    return outer.eval()


def test_adapters_are_seen():
    """peft keeps which adapters count in its modules' own values and lists."""
    model = accelerated()
    outer, given = adapted(model), inputs()
    runner = runner_of(model)
    first = agree(runner, model, given)
    with outer.disable_adapter():
        without = agree(runner, model, given)
    outer.set_adapter("b")
    second = agree(runner, model, given)
    outer.merge_adapter()
    merged = agree(runner, model, given)
    torch.testing.assert_close(merged, second, rtol=1e-3, atol=1e-4)
    outer.unmerge_adapter()
    for layer in model.modules():
        if hasattr(layer, "scaling") and isinstance(layer.scaling, dict):
            layer.set_scale("b", 3.0)
    scaled = agree(runner, model, given)
    every = [first, without, second, scaled]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(every))
    assert not runner.captured
    outer.merge_and_unload()  # plain linear layers, whose graph is captured
    agree(runner, model, given)
    assert runner.captured == 1


def switched(kind, state):
    """A linear layer of a user's, which keeps its state where nobody can watch it."""

    class Switched(kind):
        def forward(self, x):
            return super().forward(x) * (2 if state["on"] else 1)

        def gelu(self, *args):  # what bert_fast's own go by
            return super().gelu(*args) * (2 if state["on"] else 1)

    return Switched


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("made", [own, accelerated])
@pytest.mark.parametrize("parametrized", [False, True])
@pytest.mark.filterwarnings("ignore:bert_fast leaves")
def test_modules_of_others_have_no_graphs(made, parametrized):
    model, given = made(), inputs()
    path = "layers.0.feed_forward.up" if made is own else "encoder.layer.0.intermediate.dense"
    linear = model.get_submodule(path)
    runner = runner_of(model)
    before = agree(runner, model, given)
    assert runner.captured == 1
    if parametrized:
        nn.utils.parametrize.register_parametrization(linear, "weight", Doubled())
    else:
        state = {"on": True}
        linear.__class__ = switched(type(linear), state)
    found = agree(runner, model, given)
    assert (found - before).abs().max() > 1e-4
    if not parametrized:
        state["on"] = False
        torch.testing.assert_close(agree(runner, model, given), before, rtol=1e-4, atol=1e-5)
    assert runner.captured == 1


def test_torchs_own_parametrizations_have_none():
    """They may be cached, by parametrize.cached(), in memory that is let go of."""
    model = own()
    assert not Watch(model).is_looked_into()
    nn.utils.parametrizations.weight_norm(model.layers[0].feed_forward.up)
    assert Watch(model).is_looked_into()


def test_every_plain_value_is_watched():
    """Of each module and of the config: changed or gone, it is seen; put back, it is as it was."""
    for model in (own(), accelerated()):
        watch, tried = Watch(model), set()
        for thing in (*model.modules(), model.config):
            for name, value in list(thing.__dict__.items()):
                if type(value) in (bool, int, float):
                    tried.add(name)
                    thing.__dict__[name] = not value if isinstance(value, bool) else value + 1
                    assert not watch.is_as_it_was(), name
                    del thing.__dict__[name]
                    assert not watch.is_as_it_was(), name
                    thing.__dict__[name] = value
                    assert watch.is_as_it_was(), name
        assert {"eps", "training", "layer_norm_eps"} <= tried


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_captured_from_autocasts_cache(enabled):
    """Its 16-bit copies of the weights are gone with the context of the first call."""
    modes = []

    def capture(function):
        modes.append(torch.is_autocast_cache_enabled())
        return again(function)

    def broken(function):
        raise RuntimeError("out of memory")

    was = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(enabled)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            CudaGraphs(own(), capture=capture)(*inputs())
            assert torch.is_autocast_cache_enabled() is enabled
            with pytest.raises(RuntimeError, match="cannot capture BertModel: out of memory"):
                CudaGraphs(own(), capture=broken)(*inputs())
            assert torch.is_autocast_cache_enabled() is enabled
    finally:
        torch.set_autocast_cache_enabled(was)
    assert modes == [False]


@pytest.mark.parametrize("made", [own, accelerated])
def test_results_are_ordinary_tensors(made):
    """Of a graph and of a model that has none: what is learned of them can be learned."""
    model, (ids, mask) = made(), inputs()
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask)[0]
    head = nn.Linear(24, 2)
    for looked_into in (False, True):
        if looked_into:
            model.register_forward_hook(lambda *_: None)
        runner = runner_of(model)
        for found in (runner(ids, mask)[0], copy.deepcopy(runner)(ids, mask)[0]):
            assert not found.is_inference()
            assert not found.requires_grad
            grads = [torch.autograd.grad(head(x[mask.bool()]).square().sum(), head.weight)[0]
                     for x in (found, wanted)]  # fmt: skip
            torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
        assert runner.captured == (not looked_into)


def without_bias(model):
    linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
    linear.bias = None
    return model


@pytest.mark.parametrize("made", [own, accelerated])
def test_what_modules_hold_is_watched(made):
    """Each change is seen, and is as it was when it is put back, in another order, too."""
    model = without_bias(made())
    norm = next(m for m in model.modules() if isinstance(m, nn.LayerNorm))
    norm.register_buffer("one", torch.ones(1))
    norm.register_parameter("two", nn.Parameter(torch.ones(1, 1)))
    watch = Watch(model)
    assert watch.is_as_it_was()
    for module in model.modules():
        for name in ("_parameters", "_buffers", "_modules"):
            of = getattr(module, name)
            for key, value in list(of.items()):
                others = [None] if value is not None else []
                if isinstance(value, torch.Tensor):
                    others += [nn.Parameter(value.detach().clone(), value.is_floating_point()),
                               value.detach()]  # fmt: skip
                else:
                    others += [nn.Parameter(torch.ones(3)), nn.Identity()]
                for other in others:
                    of[key] = other
                    assert not watch.is_as_it_was(), (type(module), key)
                del of[key]
                assert not watch.is_as_it_was(), (type(module), key)
                of[key + "_"] = value
                assert not watch.is_as_it_was(), (type(module), key)
                del of[key + "_"]
                of[key] = value
                assert watch.is_as_it_was(), (type(module), key)
    weight = norm.weight
    norm.weight.data = norm.weight.data.clone()
    assert norm.weight is weight
    assert not watch.is_as_it_was()
