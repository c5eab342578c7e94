"""A prepacked model's layers in one call: the same bits as one by one, and never when they are no
longer what was bound."""

import copy
import pickle

import pytest
import torch
from conftest import (
    ISAS,
    cu_seqlens,
    in_threads,
    same_bits_at_any_thread_count,
    torch_threads,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import bert_fast
from bert_fast import _C, ops
from bert_fast.backends import cpu
from bert_fast.models.blocks import Linear
from bert_fast.models.workspace import Workspace

VOCABULARY = 50
# With AMX fewer rows than its own 32 are AVX-512's, and rounded otherwise.
LEAST = 32 if _C.linear_kind(0) == "amx" else 1


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    best = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(best)


def drawn_model(heads=3, head_dim=20, wide=100, **sizes):
    config = bert_fast.BertConfig(
        vocab_size=VOCABULARY, hidden_size=heads * head_dim, num_hidden_layers=2,
        num_attention_heads=heads, intermediate_size=wide, **sizes,
    )  # fmt: skip
    model = bert_fast.BertModel(config).eval()
    for parameter in model.parameters():  # biases and norms, too, are not as they begin
        nn.init.normal_(parameter, std=0.5)
    return model.prepack()


@pytest.fixture
def calls(monkeypatch):
    """How often the one call ran."""
    counted, forward = [], cpu.Encoder.forward

    def count(self, *args):
        counted.append(1)
        return forward(self, *args)

    monkeypatch.setattr(cpu.Encoder, "forward", count)
    return counted


@torch.no_grad()
def run(model, ids, mask=None, **options):
    return model(ids, mask, **options).last_hidden_state


def one_by_one(model, ids, mask=None, **options):
    """The same model's layers, each called by Python: a hook asks for that."""
    hook = model.layers[0].register_forward_hook(lambda *args: None)
    try:
        return run(model, ids, mask, **options)
    finally:
        hook.remove()


class Guarded(Workspace):
    """What is taken is full of NaN, and what lies behind it is not to be written."""

    def take(self, name, rows, width, like):
        self.taken = torch.full((rows * width + 1024,), float("nan"), dtype=like.dtype)
        return self.taken[: rows * width].view(rows, width)

    def check(self):
        assert self.taken[-1024:].isnan().all()
        return self.taken.numel() - 1024


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([8, 20, 32, 64]),
    wide=st.integers(8, 200),
    hidden_act=st.sampled_from(["gelu", "gelu_new"]),
)
def test_same_bits(calls, lengths, heads, head_dim, wide, hidden_act):
    calls.clear()
    model = drawn_model(heads, head_dim, wide, hidden_act=hidden_act)
    longest = max(1, *lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), longest))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    assert torch.equal(run(model, ids, mask), one_by_one(model, ids, mask))
    assert len(calls) == (sum(lengths) > 0)


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 17, 64, 100, 330]), min_size=2, max_size=14),
    dtype=st.sampled_from([None, "bfloat16", "int8"]),
    threads=st.integers(1, 4),
    spare=st.integers(0, 400),
)
def test_many_sequences_run_by_run(calls, lengths, dtype, threads, spare):
    """Some are computed by one thread each and the others by all: no bit depends on that."""
    lengths.append(1)
    calls.clear()
    model = drawn_model(2, 8, 40)
    model = model.for_inference(dtype) if dtype else model
    mask = (torch.arange(330) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, VOCABULARY, mask.shape)
    wanted = one_by_one(model, ids, mask)
    for capacity in (None, sum(lengths) + spare):
        model.workspace = Guarded()
        with torch_threads(threads):
            assert torch.equal(run(model, ids, mask, capacity=capacity), wanted)
        model.workspace.check()
    assert len(calls) == 2


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    precisions=st.lists(
        st.sampled_from(["float32", "bfloat16", "int8", "int8 with factors"]),
        min_size=8,
        max_size=8,
    ),
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=6),
)
def test_each_product_in_a_precision_of_its_own(calls, precisions, lengths):
    """Layer-norm converts what it writes for the product that reads it next."""
    calls.clear()
    model = drawn_model(2, 20, 72)
    linears = [module for module in model.layers.modules() if isinstance(module, Linear)]
    for linear, precision in zip(linears, precisions, strict=True):
        factors = torch.rand(linear.in_features) + 0.5 if "factors" in precision else None
        linear.packed = ops.pack_weight(linear.weight, precision.split()[0], factors)
    lengths.append(1)
    ids = torch.randint(1, VOCABULARY, (sum(lengths),))
    options = {"cu_seqlens": cu_seqlens(lengths), "max_seqlen": max(lengths)}
    wanted = one_by_one(model, ids, **options)
    model.workspace = Guarded()
    assert torch.equal(run(model, ids, **options), wanted)
    model.workspace.check()
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_rows_that_are_laid_apart(dtype):
    """Those of a multiple of 512 numbers, which would fall into the same sets of a cache."""
    model = drawn_model(8, 64, 2048)
    model = model.for_inference(dtype) if dtype else model
    ids = torch.randint(1, VOCABULARY, (2, 30))
    mask = (torch.arange(30) < torch.tensor([30, 11])[:, None]).long()
    wanted = one_by_one(model, ids, mask)
    model.workspace = Guarded()
    assert torch.equal(run(model, ids, mask), wanted)
    model.workspace.check()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_memory_does_not_grow_with_the_batch(threads):
    """Once each thread has a run of its own: of at most 144 rows."""
    model = drawn_model(2, 8, 40).for_inference("bfloat16")

    def taken(texts):
        ids = torch.randint(1, VOCABULARY, (32 * texts,))
        model.workspace = Guarded()
        with torch_threads(threads):
            run(model, ids, cu_seqlens=cu_seqlens([32] * texts))
        return model.workspace.check()

    few, many = taken(20 * threads), taken(100 * threads)
    assert few == many  # and so apart
    assert many < 5 * threads * taken(1)


def test_capacity_and_packed_input(calls):
    model, ids = drawn_model(), torch.randint(1, VOCABULARY, (3, 30))
    mask = (torch.arange(30) < torch.tensor([30, 7, 19])[:, None]).long()
    wanted = one_by_one(model, ids, mask)
    assert torch.equal(run(model, ids, mask, capacity=70), wanted)
    packed, cu_seqlens = ids[mask.bool()], torch.tensor([0, 30, 37, 56], dtype=torch.int32)
    assert torch.equal(run(model, packed, cu_seqlens=cu_seqlens), wanted[mask.bool()])
    assert len(calls) == 2


def test_same_bits_at_any_thread_count():
    model, ids = drawn_model(heads=4, head_dim=32, wide=300), torch.randint(1, 50, (5, 70))
    same_bits_at_any_thread_count(lambda: (run(model, ids),))


@settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lengths=st.lists(st.integers(LEAST, 50), min_size=2, max_size=8), data=st.data())
def test_a_text_depends_on_itself_alone(lengths, data):
    """Bit for bit: whatever else is in the batch, in whatever order."""
    model = drawn_model()
    texts = [torch.randint(1, VOCABULARY, (n,)) for n in lengths]

    def vectors(which):
        ids = nn.utils.rnn.pad_sequence([texts[i] for i in which], batch_first=True)
        states = run(model, ids, (ids > 0).long())
        return {i: states[row, : lengths[i]] for row, i in enumerate(which)}

    together = vectors(data.draw(st.permutations(range(len(texts)))))
    for i in range(len(texts)):
        assert torch.equal(vectors([i])[i], together[i])


def changed_weight(model):
    model.layers[1].feed_forward.down.weight.mul_(1.5)


def changed_bias(model):
    model.layers[0].attention.qkv.bias.add_(1.0)


def changed_norm(model):
    model.layers[0].feed_forward.norm.weight.mul_(2.0)


def new_parameter(model):
    model.layers[0].attention.out.weight = nn.Parameter(torch.randn(60, 60))


def data_moved(model):
    model.layers[1].attention.out.weight.data = torch.randn(60, 60)


def loaded(model):
    model.load_state_dict(drawn_model().state_dict())


def new_layer(model):
    model.layers[1] = drawn_model().layers[0]


def fewer_layers(model):
    del model.layers[1]


def new_linear(model):
    model.layers[0].attention.qkv = drawn_model().layers[1].attention.qkv


def new_eps(model):
    model.layers[0].attention.norm = nn.LayerNorm(60, eps=0.5)


def eps_set(model):
    model.layers[0].feed_forward.norm.eps = 0.5


def made_causal(model):
    model.layers[1].attention.causal = True


def more_heads(model):
    model.layers[0].attention.num_heads, model.layers[0].attention.head_dim = 6, 10


def data_written(model):
    model.layers[1].feed_forward.up.weight.data.mul_(1.5)


def halved_and_back(model):
    model.half().float()


CHANGES = [
    eps_set, made_causal, more_heads, data_written, halved_and_back, changed_weight,
    changed_bias, changed_norm, new_parameter, data_moved, loaded, new_layer, fewer_layers,
    new_linear, new_eps,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_seen(change):
    model, ids = drawn_model(), torch.randint(1, VOCABULARY, (2, 20))
    before = run(model, ids)
    with torch.no_grad():
        change(model)
    after = run(model, ids)
    assert not torch.equal(before, after)
    assert torch.equal(after, one_by_one(model, ids))


def test_hooks_fire(calls):
    model, ids = drawn_model(), torch.randint(1, VOCABULARY, (2, 20))
    seen = []
    for module in (model.layers[0], model.layers[1].attention, model.layers[0].feed_forward):
        hook = module.register_forward_pre_hook(lambda m, args: seen.append(m))
        run(model, ids)
        hook.remove()
    assert len(seen) == 3
    assert not calls
    hook = nn.modules.module.register_module_forward_hook(lambda m, *args: seen.append(m))
    run(model, ids)
    hook.remove()
    assert model.layers[1] in seen
    assert not calls
    run(model, ids)
    assert len(calls) == 1


def test_a_method_of_ones_own_is_called(calls):
    model, ids = drawn_model(), torch.randint(1, VOCABULARY, (2, 20))
    before = run(model, ids)
    calls.clear()
    forward = model.layers[0].forward
    model.layers[0].forward = lambda *args: forward(*args) + 1.0
    assert not torch.equal(run(model, ids), before)
    assert not calls

    class Mine(type(model.layers[1])):
        def forward(self, *args):
            return super().forward(*args) * 2.0

    model = drawn_model()
    before = run(model, ids)
    model.layers[1].__class__ = Mine
    calls.clear()
    assert torch.equal(run(model, ids), before * 2.0)
    assert not calls


def test_a_parametrised_weight_is_computed():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2.0 * weight

    model, ids = drawn_model(), torch.randint(1, VOCABULARY, (2, 20))
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        wanted.layers[0].attention.out.weight.mul_(2.0)
    run(model, ids)
    parametrize.register_parametrization(model.layers[0].attention.out, "weight", Twice())
    torch.testing.assert_close(run(model, ids), run(wanted, ids), rtol=1e-5, atol=1e-5)


def test_dropout_is_obeyed_without_gradients(calls):
    model, ids = drawn_model().train(), torch.randint(1, VOCABULARY, (2, 20))
    assert not torch.equal(run(model, ids), run(model, ids))
    assert not calls
    model.eval()
    assert torch.equal(run(model, ids), run(model, ids))
    assert len(calls) == 2


def test_hidden_states_and_gradients_take_the_layers(calls):
    model, ids = drawn_model(), torch.randint(1, VOCABULARY, (2, 20))
    last = run(model, ids)
    calls.clear()
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[-1], last)
    model(ids).last_hidden_state.sum().backward()
    assert not calls
    with bert_fast.use_backend("eager"):
        torch.testing.assert_close(run(model, ids), last, rtol=0, atol=1e-3)
    assert not calls


def test_copies_bind_their_own_weights():
    model, ids = drawn_model(), torch.randint(1, VOCABULARY, (2, 20))
    before = run(model, ids)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied, ids), before)
        with torch.no_grad():
            copied.layers[0].attention.out.weight.add_(1.0)
        assert not torch.equal(run(copied, ids), before)
        assert torch.equal(run(model, ids), before)


def test_other_types_of_numbers(calls):
    ids = torch.randint(1, VOCABULARY, (2, 20))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert run(drawn_model().to(dtype), ids).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        run(drawn_model(), ids)
    assert not calls


def test_layers_of_unlike_widths():
    """Run one by one: one buffer's width does not fit."""
    model, ids = drawn_model(), torch.randint(1, VOCABULARY, (2, 20))
    run(model, ids)
    for width in (64, 300):
        block = model.layers[1].feed_forward
        block.up, block.down = type(block.up)(60, width), type(block.down)(width, 60)
        model.prepack()
        assert torch.equal(run(model, ids), one_by_one(model, ids))


def test_wrapped_layers_run_one_by_one(calls):
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            return self.inner(*args)

    model, ids = drawn_model(), torch.randint(1, VOCABULARY, (2, 20))
    before = run(model, ids)
    calls.clear()
    for number in (1, 0):
        model.layers[number] = Wrapped(model.layers[number])
        assert torch.equal(run(model, ids), before)
    assert not calls


def test_a_model_of_inference_tensors(calls):
    with torch.inference_mode():
        model = drawn_model()
        found = model(torch.ones(1, 20, dtype=torch.int64)).last_hidden_state
    assert found.isfinite().all()
    assert not calls


def test_threads_that_meet_changed_weights():
    """Whoever packs anew frees nothing that another still reads."""
    model, ids = drawn_model(heads=4, head_dim=32, wide=400), torch.randint(1, 50, (2, 20))
    for _ in range(3):
        model.load_state_dict(drawn_model(heads=4, head_dim=32, wide=400).state_dict())
        found = in_threads(4, lambda: [run(model, ids) for _ in range(3)])
        wanted = one_by_one(model, ids)
        assert len(found) == 12
        assert all(torch.equal(one, wanted) for one in found)
