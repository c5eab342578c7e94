"""Layers that are trained as one op: the ops' own results and gradients, for every parameter, and
only where a layer is what its class says and nobody looks on."""

import contextlib
import copy
import importlib
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import NO_CUDA_HOST, assert_within
from torch import nn
from torch.utils.checkpoint import checkpoint

import bert_fast
from bert_fast import backends, ops
from bert_fast.models import bert, blocks, repeat

# Numbers that err by themselves: what stands before a layer-norm errs as its row's statistics do,
# of which some are large.
ROWS = 6
NO_TRITON = backends.why_unavailable("triton")
pytestmark = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))


@pytest.fixture(params=["triton", "cuda"])
def on(request, device, monkeypatch):
    """The device; the CPU then takes its turns as a GPU does, with Triton's kernels interpreted and
    CUDA's compiled for it."""
    if device == "cpu":
        if request.param == "cuda" and NO_CUDA_HOST:
            pytest.skip(NO_CUDA_HOST)
        for module in (blocks, repeat):
            monkeypatch.setattr(module, "product_adds_bias", lambda x: True)
        monkeypatch.setattr(bert, "can_reuse_memory", lambda x: False)
    order = (request.param, "eager")
    for table in ("cpu", "cuda"):
        monkeypatch.setitem(backends.AUTO, table, order)
    return device


@pytest.fixture
def trained(monkeypatch):
    """What each layer that was asked for as one op gave: a tensor, or None."""
    seen, call = [], ops.training_layer

    def noted(*args):
        seen.append(call(*args))
        return seen[-1]

    monkeypatch.setattr(ops, "training_layer", noted)
    return seen


def drawn(device, layers=2, dtype=torch.float32, **settings):
    settings = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) | settings
    config = bert_fast.BertConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=48,
        vocab_size=40, max_position_embeddings=16, **settings,
    )  # fmt: skip
    model = bert_fast.BertModel(config, add_pooling_layer=False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.to(device, dtype).train()


def batch(device):
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:], mask[2, 1:] = 0, 0
    return torch.randint(40, mask.shape).to(device), mask.to(device)


def learned(model, inputs, dout):
    """The output at the real tokens, and the gradient of every parameter."""
    model.zero_grad()
    real = inputs[1] > 0
    out = model(*inputs)[0]
    (out * dout.to(out)).sum().backward()
    grads = (p.grad.clone() for p in model.parameters() if p.requires_grad)
    return [out[real].detach(), *grads]


@contextlib.contextmanager
def eager():
    with backends.use_backend("eager"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "autocast"])
@pytest.mark.parametrize("settings", [{}, {"hidden_act": "gelu_new"}], ids=["erf", "tanh"])
def test_gradients(on, dtype, settings, trained):
    """Under autocast, where parameters and their gradients are in float32, of bfloat16."""
    cast = torch.autocast(on, torch.bfloat16, enabled=dtype == "autocast")
    dtype = torch.float32 if dtype == "autocast" else dtype
    model, inputs = drawn(on, dtype=dtype, **settings), batch(on)
    dout = torch.randn(3, 7, 32, device=on) * (inputs[1] > 0)[..., None]
    with cast:
        ours = learned(model, inputs, dout)
    assert len(trained) == 2
    assert all(out is not None for out in trained)
    with eager():
        with cast:
            torchs = learned(model, inputs, dout)
        truth = learned(model.double(), inputs, dout)
    assert_within(ours, torchs, truth, draws=ROWS)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_seed_drops_the_same_without_gradients(on, frozen):
    """GradCache's losses run a batch without gradients, then its parts with them; reentrant
    checkpoints do, too. ``frozen``: the first layer, which then needs no gradient of its own."""
    model, inputs = drawn(on, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1), batch(on)
    if frozen:
        model.embeddings.requires_grad_(False)
        model.layers[0].requires_grad_(False)
    dout = torch.randn(3, 7, 32, device=on) * (inputs[1] > 0)[..., None]
    torch.manual_seed(5)
    wanted = learned(model, inputs, dout)
    torch.manual_seed(5)
    with torch.no_grad():
        assert torch.equal(model(*inputs)[0][inputs[1] > 0], wanted[0])
    one = torch.ones((), device=on, requires_grad=True)
    model.zero_grad()
    torch.manual_seed(5)
    out = checkpoint(lambda by: model(*inputs)[0] * by, one, use_reentrant=True)
    (out * dout).sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(map(torch.equal, grads, wanted[1:]))


def test_dropout_and_the_ops_one_by_one(on):
    """Three seeds are drawn, of which each drops what the op would drop by it."""
    tokens, heads, dim = 11, 2, 16
    cu = torch.tensor([0, 6, 6, 11], dtype=torch.int32, device=on)
    shapes = [(96, 32), (96,), (32, 32), *[(32,)] * 3, (48, 32), (48,), (32, 48), *[(32,)] * 3]
    tensors = [(torch.randn(s, device=on) * 0.3).requires_grad_() for s in shapes]
    x, dout = torch.randn(tokens, 32, device=on).requires_grad_(), torch.randn(tokens, 32).to(on)
    pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
    numbers = ops.Numbers(heads, dim, True, "none", 1e-12, 1e-5, (0.2, 0.3, 0.4))
    torch.manual_seed(at := torch.initial_seed() % 2**31)
    out = ops.training_layer(x, cu, 6, numbers, pairs[:1], pairs[1:])
    ours = [out, *torch.autograd.grad(out, [x, *tensors], dout)]
    torch.manual_seed(at)
    seeds = [s[:1] for s in torch.randint(2**62, (3, 2), device=on).unbind()]

    def one_by_one(dtype, backend):
        y, *leaves = (t.detach().to(dtype).requires_grad_() for t in [x, *tensors])
        qkv, qkv_bias, w_out, b_out, w1, b1, w_up, b_up, w_down, b_down, w2, b2 = leaves
        options = dict(backend=backend)
        z = F.linear(y, qkv, qkv_bias).view(tokens, 3, heads, dim)
        z = ops.attention_qkv(z, cu, causal=True, dropout_p=0.2, seed=seeds[0], **options)
        z = ops.layer_norm(
            z.reshape(tokens, 32) @ w_out.t(), w1, b1, residual=y, linear_bias=b_out,
            dropout_p=0.3, seed=seeds[1], **options,
        )  # fmt: skip
        h = ops.gelu(z @ w_up.t(), b_up, **options) @ w_down.t()
        out = ops.layer_norm(
            h, w2, b2, residual=z, linear_bias=b_down, eps=1e-5, dropout_p=0.4, seed=seeds[2],
            **options,
        )  # fmt: skip
        return [out, *torch.autograd.grad(out, [y, *leaves], dout.to(dtype))]

    eager, truth = one_by_one(torch.float32, "eager"), one_by_one(torch.float64, "eager")
    assert_within(*([t.detach() for t in of] for of in (ours, eager, truth)), draws=ROWS)


@pytest.mark.parametrize("parameters", [("query", "key"), ("dense",), ("LayerNorm", "bias")])
def test_transformers_layers_and_what_does_not_learn(on, parameters, trained):
    """q, k and v apart; what is frozen gets no gradient, the rest what transformers has."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
                 intermediate_size=48, max_position_embeddings=16, hidden_dropout_prob=0.0,
                 attention_probs_dropout_prob=0.0)  # fmt: skip
    theirs = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    for name, parameter in theirs.named_parameters():
        nn.init.normal_(parameter, std=0.2)
        parameter.requires_grad = not any(part in name for part in parameters)
    theirs.to(on).train()
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    inputs = batch(on)
    dout = torch.randn(3, 7, 32, device=on) * (inputs[1] > 0)[..., None]
    found = learned(ours, inputs, dout)
    assert [out is not None for out in trained] == [True, True]
    names = [n for n, p in theirs.named_parameters() if p.requires_grad]
    torchs, truth = learned(theirs, inputs, dout), learned(theirs.double(), inputs, dout)
    assert_within(*(by_product(names, of) for of in (found, torchs, truth)), draws=ROWS)
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)


def by_product(names, found):
    """The output; and gradients by name without q, k and v, which stand together: that of k's bias
    is 0, and what is found of it is rounding."""
    parts = {}
    for name, gradient in zip(names, found[1:], strict=True):
        name = re.sub("query|key|value", "", name)
        parts.setdefault(name, []).append(gradient)
    return [found[0], *map(torch.cat, parts.values())]


def hooked(model):
    model.layers[1].register_full_backward_hook(lambda *_: None)


def hooked_inside(model):
    model.layers[1].attention.register_full_backward_pre_hook(lambda *_: None)


def no_bias(model):
    model.layers[1].attention.out.bias = None


@pytest.mark.parametrize("change", [hooked, hooked_inside, no_bias])
def test_another_kind_of_layer(on, change, trained):
    model, inputs = drawn(on), batch(on)
    change(model)
    model(*inputs)
    assert [out is not None for out in trained] == [True]


@contextlib.contextmanager
def global_hook():
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


SITUATIONS = {
    "eager": eager,
    "hooks on all modules": global_hook,
    "no gradients": torch.no_grad,
}  # fmt: skip


@pytest.mark.parametrize("situation", SITUATIONS)
def test_where_it_is_not(on, situation, trained):
    model, inputs = drawn(on), batch(on)
    with SITUATIONS[situation]():
        model(*inputs)
    assert all(out is None for out in trained)


def test_backward_twice_and_no_further(on, trained):
    """Of layers alone: the embeddings refuse a second derivative themselves."""
    model, inputs = drawn(on), batch(on)
    loss = model(*inputs)[0].square().sum()
    parameters = list(model.layers.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(NotImplementedError, match="no second derivative"):
        (loss + second[0].square().sum()).backward()
    assert len(trained) == 2


def test_backward_under_autocast(on, trained):
    """After a forward outside of it: products are those of forward."""
    model, inputs = drawn(on), batch(on)
    parameters = list(model.layers.parameters())
    loss = model(*inputs)[0].square().sum()
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    with torch.autocast(on, torch.bfloat16):
        again = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_no_real_token(on, trained):
    model, (ids, mask) = drawn(on), batch(on)
    model(ids, mask * 0)[0].sum().backward()
    assert all(p.grad.count_nonzero() == 0 for p in model.parameters())
    assert all(out is not None for out in trained)


def test_checkpointing_by_transformers(on, trained):
    """It keeps each layer's input alone: no layer is one op."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
                 intermediate_size=48, max_position_embeddings=16)  # fmt: skip
    theirs = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    ours, inputs, kept = bert_fast.accelerate(theirs.to(on).train()), batch(on), []
    for enabled in (False, True):
        if enabled:
            ours.gradient_checkpointing_enable({"use_reentrant": False})
        numbers = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, into=numbers: into.append(t.numel()) or t, lambda t: t
        )
        with hooks:
            ours(*inputs)
        kept.append(sum(numbers))
    assert len(trained) == 2
    assert kept[1] < kept[0] / 3


def narrow_norm(model):
    model.layers[1].attention.norm.weight = nn.Parameter(torch.ones(8, device=on_of(model)))


def narrow_bias(model):
    model.layers[1].feed_forward.up.bias = nn.Parameter(torch.ones(1, device=on_of(model)))


def all_dropped(model):
    model.layers[1].feed_forward.hidden_dropout_p = 1.0


def norm_elsewhere(model):
    model.layers[1].feed_forward.norm.to("meta")


def on_of(model):
    return model.embeddings.word.weight.device


@pytest.mark.parametrize("change", [narrow_norm, narrow_bias, all_dropped, norm_elsewhere])
def test_what_does_not_fit_is_the_ops_to_refuse(on, change, trained):
    model, inputs = drawn(on), batch(on)
    change(model)
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
        model(*inputs)
    assert [out is not None for out in trained] == [True, False]


def test_dropout_in_a_model(on, trained):
    """Drawn anew in every call, by torch's generator."""
    model, inputs = drawn(on, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2), batch(on)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(*inputs)[0])
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert all(out is not None for out in trained)


def test_seeds_are_drawn_once(on, trained, monkeypatch):
    """For all layers, by one launch; no two are alike. Of more layers than were said, again."""
    randint, drawn_at, given = torch.randint, [], []
    function = importlib.import_module("bert_fast.ops.training_layer")._Layer
    apply = function.apply

    def noted(x, settings, *tensors):
        given.extend(settings[-1])
        return apply(x, settings, *tensors)

    model = drawn(on, 3, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    inputs = batch(on)
    monkeypatch.setattr(function, "apply", noted)
    monkeypatch.setattr(torch, "randint", lambda *a, **k: drawn_at.append(a) or randint(*a, **k))
    model(*inputs)
    assert len(drawn_at) == 1
    assert len(trained) == 3
    assert len({int(seed[0]) for seed in given}) == 9
    assert all(seed.data_ptr() % 16 == 0 for seed in given)
    seeds = ops.Seeds(2)
    found = [seed for _ in range(4) for seed in seeds.draw(torch.device(on))]
    assert len({int(seed[0]) for seed in found}) == 12
    assert len(drawn_at) == 3


def learned_once(on):
    model, inputs = drawn(on), batch(on)
    model(*inputs)[0].square().sum().backward()
    return {n: p.grad for n, p in model.layers.named_parameters()}


def test_each_gradient_is_a_tensor_of_its_own(on, trained):
    """Those of a layer's vectors share memory: no one who holds one can tell."""
    grads = learned_once(on)
    assert all(out is not None for out in trained)
    was = {name: grad.clone() for name, grad in grads.items()}
    for name, grad in grads.items():
        assert grad.is_contiguous()
        assert grad._base is None
        assert grad.data_ptr() % 16 == 0
        versions = {n: g._version for n, g in grads.items() if n != name}
        grad.fill_(float("nan"))
        assert {n: g._version for n, g in grads.items() if n != name} == versions
        assert all(torch.equal(g, was[n]) for n, g in grads.items() if n != name)
        grad.copy_(was[name])
    kept = {g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in grads.values()}
    assert sum(kept.values()) < 1.5 * sum(g.nbytes for g in grads.values())


def test_gradients_that_are_there_are_added_to(on):
    model, inputs = drawn(on), batch(on)
    for turn in (1, 2):
        model(*inputs)[0].square().sum().backward()
        if turn == 1:
            was = [p.grad.clone() for p in model.layers.parameters()]
    for one, p in zip(was, model.layers.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 2 * one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_of_several_kinds(on, dtype):
    """By one launch, each where an optimizer reads it 16 bytes at a time."""
    module = backends.module(backends.AUTO["cpu"][0])
    shapes = [(3, 37, 75), (1, 300, 48), (2, 1, 1), (1, 5, 130), (3, 16, 768)]
    for number in range(1, 5):
        chosen = [shapes[i] for i in torch.randperm(len(shapes))[:number]]
        kinds = [torch.randn(shape, device=on) for shape in chosen]
        found = module.sums_of(*kinds, dtype=dtype)
        assert list(map(len, found)) == [shape[0] for shape in chosen]
        for kind, sums in zip(kinds, found, strict=True):
            assert all(s.data_ptr() % 16 == 0 and s.is_contiguous() for s in sums)
            truth, eager = kind.double().sum(1), kind.sum(1).to(dtype)
            assert_within(torch.stack(sums), eager, truth, name=str(chosen))


def test_column_partials(on):
    module = backends.module(backends.AUTO["cpu"][0])
    for dtype, rows in ((torch.float32, 37), (torch.float32, 33), (torch.bfloat16, 33)):
        x = torch.randn(rows, 75, device=on).to(dtype)  # 33: the last tile is one row
        partials = module.column_partials(x)
        assert (len(partials), partials.dtype, partials.shape[2]) == (1, torch.float32, 75)
        ((found,),) = module.sums_of(partials, dtype=dtype)
        assert_within(found, x.sum(0), x.double().sum(0))
