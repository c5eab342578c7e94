"""What a model's one call has bound is compared in C++, in every call: each way to change it."""

import copy
import pickle

import pytest
import torch
from torch import nn

import bert_fast
from bert_fast import _C
from bert_fast.backends import cpu
from bert_fast.models.bert import Attention

PRECISIONS = ["float32", "bfloat16", "int8"]


def drawn_model(**sizes):
    config = bert_fast.BertConfig(
        vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=80, **sizes,
    )  # fmt: skip
    model = bert_fast.BertModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.prepack()


@torch.no_grad()
def run(model, ids):
    return model(ids).last_hidden_state


def one_by_one(model, ids):
    hook = model.layers[0].register_forward_hook(lambda *args: None)
    try:
        return run(model, ids)
    finally:
        hook.remove()


def other_layers(model):
    model.layers = drawn_model().layers


def other_order(model):
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]


def put_last(model):
    kept = model.layers._modules
    kept["0"] = kept.pop("0")


def other_children(model):
    model.layers[1]._modules = dict(drawn_model().layers[0]._modules)


def other_parameters(model):
    model.layers[0].attention.out._parameters = dict(
        drawn_model().layers[0].attention.out._parameters
    )


def bias_moved(model):
    model.layers[1].feed_forward.up.bias.data = torch.randn(80)


def norm_moved(model):
    model.layers[0].attention.norm.bias.data = torch.randn(48)


def norm_written(model):
    model.layers[0].attention.norm.weight.data.mul_(2.0)


def bias_written(model):
    model.layers[1].feed_forward.up.bias.data.add_(1.0)


@pytest.mark.parametrize(
    "change",
    [
        other_layers, other_order, put_last, other_children, other_parameters, bias_moved,
        norm_moved, norm_written, bias_written,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_changes_are_seen(change):
    model, ids = drawn_model(), torch.randint(1, 50, (2, 20))
    before = run(model, ids)
    change(model)
    after = run(model, ids)
    assert not torch.equal(before, after)
    assert torch.equal(after, one_by_one(model, ids))


@pytest.mark.parametrize("where", ["class", "instance"])
def test_causal_attention_is_not_bound(monkeypatch, where):
    model, ids = drawn_model(), torch.randint(1, 50, (2, 20))
    before = run(model, ids)
    of = Attention if where == "class" else model.layers[0].attention
    monkeypatch.setattr(of, "causal", True)
    after = run(model, ids)
    assert not torch.equal(before, after)
    assert torch.equal(after, one_by_one(model, ids))


@pytest.mark.parametrize("block", ["attention", "feed_forward"])
def test_a_block_in_training_drops_out(block):
    model, ids = drawn_model(), torch.randint(1, 50, (2, 20))
    wanted = run(model, ids)
    part = getattr(model.layers[1], block).train()
    assert not torch.equal(run(model, ids), run(model, ids))
    part.eval()
    assert torch.equal(run(model, ids), wanted)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("isa", ["best", "generic"])
def test_written_through_data(precision, isa):
    """Each product, in each precision: one alone has changed."""
    best = _C.cpu_isa()
    if isa != "best":
        _C.set_cpu_isa(isa)
    try:
        x = torch.randn(20, 60)
        for shape in ((70, 60), (1, 60), (5, 60)):
            weight = torch.randn(shape)
            packed = cpu.PackedWeight(weight, precision)
            assert packed.holds(weight)
            weight.data.mul_(1.5)
            assert not packed.holds(weight)
            out = torch.empty(20, shape[0])
            found = packed.forward(x, weight, None, None, out, bert_fast.models.bert.Workspace())
            again = cpu.PackedWeight(weight, precision)
            wanted = again.forward(
                x, weight, None, None, torch.empty_like(out), bert_fast.models.bert.Workspace()
            )
            assert torch.equal(found, wanted)
            assert packed.holds(weight)
    finally:
        _C.set_cpu_isa(best)


def test_a_weight_of_any_strides_is_packed_once():
    """Read where its numbers are: no other's, and no memory behind its own."""
    views = (lambda d: d.t(), lambda d: d[:, ::3], lambda d: d[:1].expand(60, 70))
    for view in views:
        dense = torch.randn(60, 70)
        weight = view(dense)
        packed = cpu.PackedWeight(weight)
        state = packed.current(weight)
        assert packed.current(weight) is state
        dense.data.mul_(2.0)
        assert packed.current(weight) is not state


def test_what_is_no_number_is_packed_once():
    weight = torch.full((20, 30), float("nan"))
    for precision in PRECISIONS:
        packed = cpu.PackedWeight(weight, precision)
        assert packed.holds(weight)


def test_copies_of_a_packed_weight_hold_no_other():
    weight = torch.randn(40, 30)
    packed = cpu.PackedWeight(weight)
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert not copied.holds(weight)
        copied.current(weight)
        assert copied.holds(weight)


def test_nothing_changed_is_bound_once(monkeypatch):
    """Also after hooks that are gone, and where somebody counts in a layer's attributes."""
    bound, bind = [], cpu.Encoder._bind
    monkeypatch.setattr(cpu.Encoder, "_bind", lambda self: bound.append(1) or bind(self))
    model, ids = drawn_model(), torch.randint(1, 50, (2, 20))
    for _ in range(3):
        run(model, ids)
        one_by_one(model, ids)
        hook = model.layers[1].register_forward_hook(lambda *args: None)
        run(model, ids)
        hook.remove()
        model.layers[0].count = getattr(model.layers[0], "count", 0) + 1
    assert len(bound) == 1


def test_scripted_layers_run_one_by_one():
    model, ids = drawn_model(), torch.randint(1, 50, (2, 20))
    before = run(model, ids)

    class Twice(nn.Module):
        def forward(self, x):
            return 2.0 * x

    class Then(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.after = inner, torch.jit.script(Twice())

        def forward(self, *args):
            return self.after(self.inner(*args))

    model.layers[1] = Then(model.layers[1])
    assert torch.equal(run(model, ids), 2.0 * before)
