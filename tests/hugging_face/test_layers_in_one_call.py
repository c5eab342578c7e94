"""Accelerated layers with packed weights, in one call: the same bits as one by one, and never when
they are no longer what was bound."""

import copy
import pickle

import pytest
import torch
import transformers
from conftest import ISAS, in_threads, same_bits_at_any_thread_count, torch_threads
from small_models import SIZES
from test_accelerate import FAMILIES, build
from torch import nn

import bert_fast
from bert_fast import _C
from bert_fast.backends import cpu
from bert_fast.models.one_call import OneCall


@pytest.fixture
def calls(monkeypatch):
    """How often the one call ran."""
    counted, forward = [], cpu.Encoder.forward

    def count(self, *args):
        counted.append(1)
        return forward(self, *args)

    monkeypatch.setattr(cpu.Encoder, "forward", count)
    return counted


def drawn_model(**options):
    config = transformers.BertConfig(**SIZES | options)
    model = transformers.BertModel(config).eval()
    for parameter in model.parameters():  # biases and norms, too, are not as they begin
        nn.init.normal_(parameter, std=0.5)
    return bert_fast.accelerate(model, prepack=True)


def batch(lengths=(19, 4, 25)):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(5, 60, mask.shape), "attention_mask": mask}


@torch.no_grad()
def run(model, inputs):
    return model(**inputs)[0]


def one_by_one(model, inputs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OneCall, "__call__", lambda *args: None)
        return run(model, inputs)


@pytest.mark.parametrize("made", ["prepack", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits(calls, family, made):
    model = build(family)
    if made == "prepack":
        bert_fast.accelerate(model, prepack=True)
    else:
        bert_fast.accelerate(model, dtype=made)
    assert not calls
    for inputs in (batch(), batch([20, 20]), batch([16])):
        found = run(model, inputs)
        assert torch.equal(found, one_by_one(model, inputs))
        wanted = run(bert_fast.restore(copy.deepcopy(model)), inputs)
        real = inputs["attention_mask"].bool()
        if made in ("prepack", "float32"):
            torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)
    assert len(calls) == (0 if family == "MPNet" else 3)


def test_runs_of_many_texts_and_rows_laid_apart(calls):
    """Three products for queries, keys and values, 512 wide: csrc/cpu/encoder.cpp's other paths."""
    model = drawn_model(hidden_size=512, intermediate_size=1024, max_position_embeddings=100)
    inputs = batch([90, 3, 90, 80, 70, 90, 88, 60, 80, 90, 17, 82])
    wanted = one_by_one(model, inputs)
    for threads in (1, 2, 3):
        with torch_threads(threads):
            assert torch.equal(run(model, inputs), wanted)
    assert len(calls) == 3


@pytest.mark.parametrize("isa", ISAS)
def test_on_each_instruction_set(calls, isa):
    best = _C.cpu_isa()
    _C.set_cpu_isa(isa)
    try:
        model, inputs = drawn_model(hidden_act="gelu_new"), batch()
        assert torch.equal(run(model, inputs), one_by_one(model, inputs))
        assert len(calls) == 1
    finally:
        _C.set_cpu_isa(best)
    found = run(model, inputs)  # packed for another one
    assert torch.equal(found, one_by_one(model, inputs))


def test_same_bits_at_any_thread_count():
    model, inputs = drawn_model(), batch([30, 40, 7])
    same_bits_at_any_thread_count(lambda: (run(model, inputs),))


def attention(model, layer=1):
    return model.encoder.layer[layer].attention


def weight(model):
    attention(model).self.key.weight.mul_(1.5)


def weight_through_data(model):
    attention(model).self.value.weight.data.mul_(1.5)


def bias(model):
    attention(model).self.value.bias.add_(1.0)


def bias_through_data(model):
    attention(model).self.query.bias.data.add_(1.0)


def bias_moved(model):
    attention(model).self.query.bias.data = torch.randn(32)


def norm_through_data(model):
    attention(model).output.LayerNorm.weight.data.mul_(2.0)


def norm_moved(model):
    model.encoder.layer[0].output.LayerNorm.bias.data = torch.randn(32)


def eps(model):
    model.encoder.layer[0].output.LayerNorm.eps = 0.5


def parameter(model):
    model.encoder.layer[0].intermediate.dense.weight = nn.Parameter(torch.randn(64, 32))


def loaded(model):
    model.load_state_dict(drawn_model().state_dict())


def other_linear(model):
    attention(model).self.key = nn.Linear(32, 32)


def other_layer(model):
    model.encoder.layer[1] = drawn_model().encoder.layer[0]


def fewer_layers(model):
    del model.encoder.layer[1]


def other_order(model):
    layers = model.encoder.layer
    layers[0], layers[1] = layers[1], layers[0]


def other_layers(model):
    model.encoder.layer = drawn_model().encoder.layer


def other_precision(model):
    bert_fast.accelerate(model, dtype="bfloat16")


def halved_and_back(model):
    model.half().float()


def optimized(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(**batch())[0].square().sum().backward()
    optimizer.step()


CHANGES = [
    weight, weight_through_data, bias, bias_through_data, bias_moved, norm_through_data, norm_moved,
    eps, parameter, loaded, other_linear, other_layer, fewer_layers, other_order, other_layers,
    other_precision, halved_and_back, optimized,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_seen(change):
    model, inputs = drawn_model(), batch()
    before = run(model, inputs)
    with torch.no_grad():
        change(model)
    after = run(model, inputs)
    assert not torch.equal(before, after)
    assert torch.equal(after, one_by_one(model, inputs))


def test_what_is_not_packed_is_not_bound(calls, monkeypatch):
    """Nor is anything of it looked at."""
    looked = []
    monkeypatch.setattr("bert_fast.models.one_call._bind", lambda *args: looked.append(1))
    model, inputs = bert_fast.accelerate(build("Bert")), batch()
    run(model, inputs)
    run(model, inputs)
    assert not calls
    assert not looked


def test_dropout_is_obeyed_without_gradients(calls):
    model, inputs = drawn_model(), batch()
    wanted = run(model, inputs)
    calls.clear()
    model.train()
    assert not torch.equal(run(model, inputs), run(model, inputs))
    model.eval()
    part = attention(model).self.train()  # one dropout alone
    assert not torch.equal(run(model, inputs), run(model, inputs))
    part.eval()
    model.encoder.layer[0].output.dropout.train()
    assert not torch.equal(run(model, inputs), run(model, inputs))
    assert not calls
    model.encoder.layer[0].output.dropout.p = 0.0
    assert torch.equal(run(model, inputs), wanted)
    assert len(calls) == 1


def test_hooks_fire(calls):
    model, inputs = drawn_model(), batch()
    wanted, seen = run(model, inputs), []
    calls.clear()
    layer = model.encoder.layer[1]
    for module in (layer, layer.attention.self, layer.output, layer.intermediate.dense):
        hook = module.register_forward_hook(lambda module, *args: seen.append(module))
        run(model, inputs)
        hook.remove()
    assert len(seen) == 4
    hook = nn.modules.module.register_module_forward_hook(lambda m, *args: seen.append(m))
    run(model, inputs)
    hook.remove()
    assert layer in seen[4:]
    forward = layer.forward
    layer.forward = lambda *args, **options: forward(*args, **options)
    run(model, inputs)
    del layer.forward
    assert not calls
    assert torch.equal(run(model, inputs), wanted)
    assert len(calls) == 1


def test_hidden_states_and_what_they_leave_behind(calls):
    """transformers 5 keeps hooks on the layers, which do nothing while nobody asks."""
    model, inputs = drawn_model(), batch()
    wanted = run(model, inputs)
    calls.clear()
    with torch.no_grad():
        for _ in range(2):
            out = model(**inputs, output_hidden_states=True)
            assert torch.equal(out.last_hidden_state, wanted)
            assert torch.equal(out.hidden_states[-1], wanted)
            assert len(out.hidden_states) == 3
        assert not calls
        assert torch.equal(run(model, inputs), wanted)
        assert len(calls) == 1
        assert model(**inputs).hidden_states is None
        out = model(**inputs, output_hidden_states=True)
        assert torch.equal(out.hidden_states[-1], wanted)
        assert not torch.equal(out.hidden_states[1], wanted)


def test_what_else_runs_one_by_one(calls):
    model, inputs = drawn_model(), batch()
    wanted = run(model, inputs)
    calls.clear()
    model(**inputs)[0].sum().backward()
    with bert_fast.use_backend("eager"):
        torch.testing.assert_close(run(model, inputs), wanted, rtol=0, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        run(model, inputs)
    for dtype in (torch.float64, torch.bfloat16):
        assert run(copy.deepcopy(model).to(dtype), inputs).dtype == dtype
    assert not calls
    with torch.inference_mode():
        assert torch.equal(model(**inputs)[0], wanted)
    assert len(calls) == 1


def test_an_encoder_in_the_place_of_ours():
    model, other, inputs = drawn_model(), drawn_model(), batch()
    run(model, inputs)
    model.encoder = copy.deepcopy(other.encoder)
    assert torch.equal(run(model, inputs), one_by_one(model, inputs))
    model.encoder = bert_fast.restore(other).encoder  # computes the padding, by the mask
    wanted = run(bert_fast.restore(copy.deepcopy(model)), inputs)
    assert torch.equal(run(model, inputs), wanted)


def test_adapters_are_computed(calls):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    model, inputs = drawn_model(), batch()
    before = run(model, inputs)
    calls.clear()
    options = peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, options).eval()
    after = run(adapted, inputs)
    assert not torch.equal(before, after)
    assert not calls
    merged = adapted.merge_and_unload()  # through .data, and the module is put back
    torch.testing.assert_close(run(merged, inputs), after, rtol=1e-3, atol=1e-3)
    assert len(calls) == 1
    assert torch.equal(run(merged, inputs), one_by_one(merged, inputs))


def test_a_pruned_model():
    """Heads that are gone leave products of another width."""
    model, inputs = drawn_model(), batch()
    run(model, inputs)
    own = attention(model)
    with torch.no_grad():
        for linear in (own.self.query, own.self.key, own.self.value):
            linear.weight = nn.Parameter(linear.weight[:16].clone())
            linear.bias = nn.Parameter(linear.bias[:16].clone())
            linear.out_features = 16
        own.output.dense.weight = nn.Parameter(own.output.dense.weight[:, :16].clone())
    found, real = run(model, inputs), inputs["attention_mask"].bool()
    assert torch.equal(found, one_by_one(model, inputs))
    wanted = run(bert_fast.restore(model), inputs)
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)


def test_copies_bind_their_own_weights():
    model, inputs = drawn_model(), batch()
    before = run(model, inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied, inputs), before)
        with torch.no_grad():
            attention(copied).output.dense.weight.add_(1.0)
        assert not torch.equal(run(copied, inputs), before)
        assert torch.equal(run(model, inputs), before)


def test_given_embeddings_are_not_written_to():
    model, inputs = drawn_model(), torch.randn(2, 20, 32)
    given = inputs.clone()
    with torch.no_grad():
        model(inputs_embeds=given)
        model.encoder.layer[0](given)  # transformers' own way
    assert torch.equal(given, inputs)


def test_nothing_changed_is_bound_once(monkeypatch):
    """Also after hooks that are gone, and where somebody counts in a layer's attributes."""
    bound, bind = [], cpu.Encoder._bind
    monkeypatch.setattr(cpu.Encoder, "_bind", lambda self: bound.append(1) or bind(self))
    model, inputs = drawn_model(), batch()
    for _ in range(3):
        run(model, inputs)
        for hooked in (*model.encoder.layer, attention(model)):
            hook = hooked.register_forward_hook(lambda *args: None)
            run(model, inputs)
            hook.remove()
        layer = model.encoder.layer[0]
        layer.count = getattr(layer, "count", 0) + 1
    assert len(bound) == 1


def test_weights_that_go_are_let_go_of():
    model, inputs = drawn_model(), batch()
    run(model, inputs)
    one_call = model.encoder._bert_fast[-1]
    assert one_call.bound[1] is not None
    model.half()
    assert one_call.bound[1] is None


def test_threads_that_meet_changed_weights():
    """Whoever packs anew frees nothing that another still reads."""
    model, inputs = drawn_model(), batch()
    for _ in range(3):
        model.load_state_dict(drawn_model().state_dict())
        found = in_threads(4, lambda: [run(model, inputs) for _ in range(3)])
        wanted = one_by_one(model, inputs)
        assert len(found) == 12
        assert all(torch.equal(one, wanted) for one in found)


def test_around_the_layers_torch_has_one_thread_for_few_numbers(two_threads):
    """A thread of OpenMP's that still spins would take a core from the layers."""
    wide = dict(hidden_size=256, num_attention_heads=4, num_hidden_layers=1)
    model, inputs, seen = drawn_model(**wide), batch([39] * 8), []
    for module in (model.embeddings, model.pooler):
        module.register_forward_hook(lambda *args: seen.append(torch.get_num_threads()))
    run(model, inputs)  # binds the layers
    large = batch([39] * 120)
    for given, wanted in ((inputs, [1, 1]), (large, [2, 2]), (inputs, [1, 1])):
        seen.clear()
        run(model, given)
        assert seen == wanted
    seen.clear()
    with torch.no_grad():
        model(**inputs, output_hidden_states=True)
    assert seen == [1, 2]
    assert torch.get_num_threads() == 2


def test_layers_one_by_one_have_all_threads(two_threads, monkeypatch):
    """Also in a model whose layers ran in one call before; and so has the caller, afterwards."""
    model, inputs = drawn_model(), batch()
    run(model, inputs)
    seen, packed_forward = [], cpu.PackedWeight.forward

    def forward(*args):
        seen.append(torch.get_num_threads())
        return packed_forward(*args)

    monkeypatch.setattr(cpu.PackedWeight, "forward", forward)
    monkeypatch.setattr(OneCall, "__call__", lambda *args: None)
    run(model, inputs)
    assert set(seen) == {2}
    with pytest.raises(IndexError):
        run(model, {"input_ids": torch.full((2, 20), 1000)})
    assert torch.get_num_threads() == cpu.num_threads() == 2


def test_embeddings_of_another_width_are_refused():
    """Where memory would be written past its end."""
    model, inputs = drawn_model(), batch()
    run(model, inputs)
    config = copy.deepcopy(model.config)
    config.hidden_size = model.config.hidden_size // 2
    model.embeddings = type(model.embeddings)(config).eval()
    with pytest.raises((ValueError, RuntimeError)):
        run(model, inputs)
