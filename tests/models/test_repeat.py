"""Layers that repeat the first one's launches, and those of earlier forwards: the same bits as one
by one, and only where a layer is of the first one's kind and nobody looks on."""

import contextlib
import copy
import os

import pytest
import torch
from conftest import compiling, json_of
from repeating import (  # noqa: F401
    NO_TRITON,
    batch,
    check_repeated,
    drawn,
    on_device,
    one_by_one,
    repeated_layers,
    warm,
)
from torch import nn

import bert_fast
from bert_fast import backends
from bert_fast.models import bert

pytestmark = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_same_bits(on, dtype, repeated, monkeypatch):
    model, inputs = drawn(on, dtype=dtype), batch(on)
    warm(model, inputs)
    repeated.clear()
    found = model(*inputs, output_hidden_states=True)
    assert len(repeated) == 3
    expected = one_by_one(model, inputs, monkeypatch, output_hidden_states=True)
    assert len(repeated) == 3
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(found.pooler_output, expected.pooler_output)


@torch.no_grad()
def test_it_is_what_transformers_computes(on, repeated):
    transformers = pytest.importorskip("transformers")
    model, (ids, mask) = drawn(on), batch(on)
    theirs = transformers.BertModel(transformers.BertConfig(**vars_of(model.config))).eval().to(on)
    theirs.load_state_dict(hugging_face_state(model))
    warm(model, (ids, mask))
    repeated.clear()
    found, expected = model(ids, mask)[0], theirs(ids, mask)[0]
    assert len(repeated) == 3
    torch.testing.assert_close(found[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hooks_that_transformers_leaves(on, repeated, monkeypatch):
    """Those that record hidden states are looked past while none are asked for."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("bert_fast.hugging_face.accelerated.can_reuse_memory", lambda x: False)
    config = transformers.BertConfig(**vars_of(drawn("cpu").config))
    theirs, inputs = transformers.BertModel(config).eval().to(on), batch(on)
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    warm(ours, inputs)
    for _ in range(2):
        repeated.clear()
        assert ours(*inputs).hidden_states is None
        assert len(repeated) == 3
        found, expected = (m(*inputs, output_hidden_states=True) for m in (ours, theirs))
        real = inputs[1] > 0
        for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-4)


def vars_of(config):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "vocab_size", "max_position_embeddings")  # fmt: skip
    return {name: getattr(config, name) for name in names}


def hugging_face_state(model):
    import tempfile

    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {
            name.removeprefix("bert."): tensor
            for name, tensor in load_file(os.path.join(folder, "model.safetensors")).items()
        }


class Halved(bert.FeedForward):
    def forward(self, x, workspace):
        return super().forward(x, workspace) / 2


def hook(layers, seen):
    layers[1].register_forward_hook(lambda module, args, out: seen.append(1) or 2 * out)


def hook_inside(layers, seen):
    layers[1].attention.register_forward_pre_hook(lambda module, args: seen.append(1))


def own_forward(layers, seen):
    layers[1].feed_forward.forward = lambda x, workspace: seen.append(1) or x


def other_class(layers, seen):
    layers[1].feed_forward.__class__ = Halved


def other_eps(layers, seen):
    layers[1].feed_forward.norm.eps = 0.5


def other_activation(layers, seen):
    layers[1].feed_forward.approximate = "tanh"


def causal(layers, seen):
    layers[1].attention.causal = True


def no_bias(layers, seen):
    layers[1].attention.out.bias = None


def other_dtype(layers, seen):
    layers[1].attention.norm.double().weight.data *= 1.5


def other_width(layers, seen):
    for name, shape in (("up", (16, 32)), ("down", (32, 16))):
        linear = getattr(layers[1].feed_forward, name)
        linear.weight = nn.Parameter(torch.randn(shape, device=linear.weight.device))
    layers[1].feed_forward.up.bias = nn.Parameter(torch.randn(16, device=linear.weight.device))
    layers[1].feed_forward.up.out_features = 16


def parametrised(layers, seen):
    kind = type("Doubled", (nn.Module,), {"forward": lambda self, w: seen.append(1) or 2 * w})
    nn.utils.parametrize.register_parametrization(layers[1].attention.qkv, "weight", kind())


def strided_norm(layers, seen):
    norm = layers[1].attention.norm
    norm.weight = nn.Parameter(torch.randn(64, device=norm.weight.device)[::2])


def expanded_bias(layers, seen):
    up = layers[1].feed_forward.up
    up.bias = nn.Parameter(torch.randn(1, device=up.weight.device).expand(48))


def compiled(layers, seen):
    """As nn.Module.compile leaves a layer."""
    layer = layers[1]
    layer._compiled_call_impl = lambda *args: seen.append(1) or layer.forward(*args)


CHANGES = [strided_norm, expanded_bias, compiled, hook, hook_inside, own_forward, other_class,
           other_eps, other_activation, causal, no_bias, other_dtype, other_width,
           parametrised]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_a_layer_of_another_kind_runs(on, change, repeated, monkeypatch):
    """The second of three; the third is of the first one's kind."""
    model, inputs, seen = drawn(on), batch(on), []
    plain = model(*inputs)[0]
    change(model.layers, seen)
    warm(model, inputs)
    repeated.clear()
    seen.clear()
    found = model(*inputs)[0]
    assert len(repeated) == 2
    looked = len(seen)
    expected = one_by_one(model, inputs, monkeypatch)[0]
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain) or looked
    assert len(seen) == 2 * looked


@torch.no_grad()
def test_what_lies_otherwise_in_memory_is_not_repeated(on, repeated, monkeypatch):
    """The last of three gets what a hook behind the second one has turned."""
    model, inputs = drawn(on), batch(on)
    model.layers[1].register_forward_hook(lambda module, args, out: out.t().contiguous().t())
    warm(model, inputs)
    check_repeated(model, inputs, repeated, monkeypatch, 1)


@torch.no_grad()
def test_many_tokens_are_not_repeated(on, repeated, monkeypatch):
    model, inputs = drawn(on), batch(on)
    monkeypatch.setattr("bert_fast.ops.repeat.MOST_ELEMENTS", 10 * 32)
    warm(model, inputs)
    model(*inputs)
    assert not repeated


@contextlib.contextmanager
def global_hook():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def patched_class():
    forward = bert.Layer.forward
    bert.Layer.forward = lambda self, x, *args: forward(self, x, *args)
    try:
        yield
    finally:
        bert.Layer.forward = forward


SITUATIONS = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cuda" if torch.cuda.is_available() else "cpu",
                                       torch.bfloat16),
    "eager": lambda: backends.use_backend("eager"),
    "hooks on all modules": global_hook,
    "a layer's class": patched_class,
}  # fmt: skip


@pytest.mark.parametrize("situation", SITUATIONS)
@torch.no_grad()
def test_not_repeated(on, situation, repeated):
    model, inputs = drawn(on), batch(on)
    with SITUATIONS[situation]():
        model(*inputs)
        model(*inputs)
    assert not repeated
    warm(model, inputs)
    repeated.clear()
    model(*inputs)
    assert len(repeated) == 3


@torch.no_grad()
def test_dropout_is_not_repeated(on, repeated):
    """Each layer draws its own."""
    model, inputs = drawn(on, hidden_dropout_prob=0.5), batch(on)
    model.train()
    model(*inputs)
    model(*inputs)
    assert not repeated


LAUNCHES = """
import json
import torch
from bert_fast.bench import host
from bert_fast.bench.stand_in import stand_in
from bert_fast.models import repeat

host._stand_in()
launched, repeats = [], []
stand_in(90, launched.append)
model = host._makers()["BertModel"](4).to(torch.bfloat16).eval()
# Of the third layer one bias is not aligned: its kernel is another one.
bias = model.layers[2].feed_forward.down.bias
bias.data = torch.zeros(len(bias) + 1, dtype=bias.dtype)[1:]
names = {p.data_ptr(): name for name, p in model.named_parameters()}
ids = torch.randint(1, 99, (1, 8))
made = repeat.Layers.__init__

def begin(self, describe, layers, x, packing):
    made(self, describe, layers, x, packing)
    names[packing.cu_seqlens.data_ptr()] = "offsets"
    alive.append(packing)  # lest another forward's offsets lie there

alive = []
repeat.Layers.__init__ = begin

def run():
    launched.clear()
    with torch.inference_mode():
        model(ids)
    found = []
    for grid_0, grid_1, grid_2, stream, function, metadata, _, *_hooks, rest in (
        (*given[:9], given[9:]) for given in launched
    ):
        rest = [
            names.get(g, "a tensor" if g > 2**32 else g) if type(g) is int else repr(g)
            for g in rest
        ]
        found.append(((grid_0, grid_1, grid_2, stream), rest))
    return found

call = repeat.ops.Repeat.__call__
repeat.ops.Repeat.__call__ = lambda self, *args: repeats.append(1) or call(self, *args)
run(), run()
repeats.clear()
found = run()
count = len(repeats)
repeat.ops.can_repeat = lambda x: False
print(json.dumps([count, found, run()]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a stand-in for the driver")
def test_the_same_launches():
    """Through Triton's own launcher: the same kernels' arguments, the same layer's parameters."""
    from bert_fast.kernels import launch

    if not launch._as_known():
        pytest.skip("this Triton launches in its own way: nothing is kept, and nothing repeated")
    count, found, expected = json_of(compiling("-c", LAUNCHES))
    assert count == 4  # the first one's from the run before
    assert found == expected
    assert sum("offsets" in rest for _, rest in found) == 4
    for layer in range(4):
        assert any(f"layers.{layer}.feed_forward.up.bias" in rest for _, rest in found)
