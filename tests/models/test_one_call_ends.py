"""What stands before and after a model's layers in one call: the same bits and the same refusals
as by the calls that BertModel's ``_embed`` and ``_pool`` make, and those if somebody looks on."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import bert_fast
from bert_fast import backends, ops
from bert_fast.backends import cpu
from bert_fast.models import bert, blocks
from bert_fast.models.one_call import OneCall

VOCABULARY, POSITIONS, TYPES = 50, 30, 3


def drawn_model(**sizes):
    config = bert_fast.BertConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=1, num_attention_heads=3,
        intermediate_size=80, max_position_embeddings=POSITIONS, type_vocab_size=TYPES, **sizes,
    )  # fmt: skip
    model = bert_fast.BertModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.prepack()


def run(model, *args, **options):
    with torch.no_grad():
        return model(*args, **options)


def by_definition(model, *args, **options):
    """Every check, pack and op by a call of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OneCall, "from_ids", lambda *args: None)
        patch.setattr(OneCall, "of_first", lambda *args: None)
        return run(model, *args, **options)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one[:2], other[:2], strict=True))


@pytest.fixture
def calls(monkeypatch):
    """How often embeddings and pooler were not called as modules."""
    counted = []
    embed, of_first = cpu.Embeddings.forward, cpu.PackedWeight.of_first
    monkeypatch.setattr(
        cpu.Embeddings, "forward", lambda *args: counted.append("forward") or embed(*args)
    )
    monkeypatch.setattr(
        cpu.PackedWeight, "of_first", lambda *args: counted.append("of_first") or of_first(*args)
    )
    return counted


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=5),
    mask=st.sampled_from([None, torch.int64, torch.bool, torch.float32, "holes", "packed"]),
    dtypes=st.tuples(*[st.sampled_from([None, torch.int32, torch.int64])] * 2),
    wide=st.booleans(),
    strided=st.booleans(),
)
def test_same_bits(calls, lengths, mask, dtypes, wide, strided):
    model, seqlen = drawn_model(), max(1, *lengths)
    shape = len(lengths), seqlen * (1 + strided)
    drawn = [
        None if dtype is None else torch.randint(0, most, shape, dtype=dtype)[:, :seqlen]
        for dtype, most in zip((torch.int64 if wide else torch.int32, *dtypes),
                               (VOCABULARY, TYPES, POSITIONS), strict=True)
    ]  # fmt: skip
    real = torch.arange(seqlen) < torch.tensor(lengths)[:, None]
    if mask == "packed":
        cu_seqlens = nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
        ids, types, positions = (None if d is None else d[real] for d in drawn)
        given, options = (ids, None, types, positions), {"cu_seqlens": cu_seqlens}
    else:
        if mask == "holes":
            real, mask = torch.rand(real.shape) < 0.7, torch.int64
        ids, types, positions = drawn
        given, options = (ids, None if mask is None else real.to(mask), types, positions), {}
    wanted = by_definition(model, *given, **options)
    calls.clear()
    assert same(run(model, *given, **options), wanted)
    if mask is None:
        assert ("forward" in calls) == all(g is None or g.is_contiguous() for g in given)


@pytest.mark.parametrize("precision", [None, "float32", "int8"])
def test_a_single_query_calls_neither(calls, precision):
    model, ids = drawn_model(), torch.randint(1, VOCABULARY, (1, 16))
    if precision is not None:
        model.for_inference(precision)
    found = [run(model, ids, torch.ones_like(ids), 0 * ids), run(model, ids)]
    with torch.no_grad():
        states, _ = model.encode(ids[0], cu_seqlens=torch.tensor([0, 16], dtype=torch.int32))
    assert calls == ["forward", "of_first", "forward", "of_first", "forward"]
    assert all(same(one, by_definition(model, ids)) for one in found)
    assert torch.equal(states[-1], found[0].last_hidden_state[0])


REFUSED = {
    "an id too large": lambda ids: dict(input_ids=ids + VOCABULARY),
    "a negative id": lambda ids: dict(input_ids=ids - VOCABULARY),
    "a large id at padding": lambda ids: dict(
        input_ids=ids.index_fill(1, torch.tensor([19]), 99), attention_mask=torch.arange(20) < 19
    ),
    "a type too large": lambda ids: dict(input_ids=ids, token_type_ids=0 * ids + TYPES),
    "a position too large": lambda ids: dict(input_ids=ids, position_ids=0 * ids + POSITIONS),
    "types of another shape": lambda ids: dict(input_ids=ids, token_type_ids=ids[:, :5]),
    "floats": lambda ids: dict(input_ids=ids.float()),
    "a list": lambda ids: dict(input_ids=ids.tolist()),
    "a number": lambda ids: dict(input_ids=ids, token_type_ids=0),
    "nothing": lambda ids: dict(input_ids=None),
    "three dimensions": lambda ids: dict(input_ids=ids[None]),
    "a scalar": lambda ids: dict(input_ids=ids[0, 0]),
    "a mask of twos": lambda ids: dict(input_ids=ids, attention_mask=0 * ids + 2),
    "a mask of another shape": lambda ids: dict(input_ids=ids, attention_mask=ids[:, :5] * 0),
    "a mask by pair": lambda ids: dict(input_ids=ids, attention_mask=torch.ones(2, 20, 20)),
    "a mask that is none": lambda ids: dict(input_ids=ids, attention_mask=1),
    "too long": lambda ids: dict(input_ids=torch.ones(1, POSITIONS + 1, dtype=torch.int64)),
    "packed and a mask": lambda ids: dict(
        input_ids=ids[0], attention_mask=ids, cu_seqlens=torch.tensor([0, 20]).int()
    ),
    "padded and offsets": lambda ids: dict(input_ids=ids, cu_seqlens=torch.tensor([0, 20]).int()),
    "offsets past the end": lambda ids: dict(
        input_ids=ids[0], cu_seqlens=torch.tensor([0, 21]).int()
    ),
    "offsets that decrease": lambda ids: dict(
        input_ids=ids[0], cu_seqlens=torch.tensor([0, 9, 5, 20]).int()
    ),
    "wide offsets": lambda ids: dict(input_ids=ids[0], cu_seqlens=torch.tensor([0, 20])),
    "too short a longest": lambda ids: dict(
        input_ids=ids[0], cu_seqlens=torch.tensor([0, 20]).int(), max_seqlen=3
    ),
    "packed, too long": lambda ids: dict(
        input_ids=torch.ones(POSITIONS + 1, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, POSITIONS + 1]).int(),
    ),
    "capacity without a mask": lambda ids: dict(input_ids=ids, capacity=40),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_same_refusals(name):
    model, ids = drawn_model(), torch.randint(0, VOCABULARY, (1, 20))
    run(model, ids)
    arguments, said = REFUSED[name](ids), []
    for call in (by_definition, run):
        try:
            call(model, **arguments)
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            said.append((type(error), str(error)))
    assert len(said) == 2
    assert said[0] == said[1]


def test_an_id_outside_of_a_table_cut_by_hand():
    """The config says that it is there."""
    model, ids = drawn_model(), torch.full((1, 16), 45)
    run(model, ids)
    model.embeddings.word = nn.Embedding(40, 48)
    with pytest.raises(IndexError, match="input_ids out of range"):
        run(model, ids)


def test_no_tokens():
    model = drawn_model()
    run(model, torch.ones(1, 16, dtype=torch.int64))
    for inputs in ((torch.empty(0, 16).long(),), (torch.empty(2, 0).long(),),
                   (torch.ones(2, 16).long(), torch.zeros(2, 16))):  # fmt: skip
        assert same(run(model, *inputs), by_definition(model, *inputs))


def word_written(model):
    model.embeddings.word.weight.data.mul_(2.0)


def word_moved(model):
    model.embeddings.word.weight.data = torch.randn(VOCABULARY, 48)


def new_position(model):
    model.embeddings.position = nn.Embedding(POSITIONS, 48)


def new_type(model):
    model.embeddings.token_type.weight = nn.Parameter(torch.randn(TYPES, 48))


def new_norm(model):
    model.embeddings.norm.bias = nn.Parameter(torch.randn(48))


def eps_set(model):
    model.embeddings.norm.eps = 0.5


def new_embeddings(model):
    model.embeddings = drawn_model().embeddings


def embeddings_hooked(model):
    model.embeddings.register_forward_hook(lambda module, given, out: out + 1.0)


def dropout_hooked(model):
    model.embeddings.dropout.register_forward_pre_hook(lambda module, given: (given[0] * 2.0,))


def dropout_replaced(model):
    model.embeddings.dropout = nn.Tanh()


def forward_replaced(model):
    forward = model.embeddings.forward
    model.embeddings.forward = lambda *args: forward(*args) * 0.5


def pooler_written(model):
    model.pooler.weight.data.mul_(2.0)


def pooler_changed(model):
    with torch.no_grad():
        model.pooler.bias.add_(1.0)


def pooler_moved(model):
    model.pooler.weight.data = torch.randn(48, 48)


def new_pooler(model):
    model.pooler = nn.Linear(48, 48)


def pooler_hooked(model):
    model.pooler.register_forward_hook(lambda module, given, out: out + 1.0)


def pooler_replaced(model):
    model.pooler.forward = lambda first: first


def pruned(module):
    prune.l1_unstructured(module, "weight", 0.9)


def word_pruned(model):
    pruned(model.embeddings.word)


def norm_pruned_again(model):
    pruned(model.embeddings.norm)
    run(model, torch.ones(1, 16, dtype=torch.int64))
    model.embeddings.norm.weight = model.embeddings.norm.weight_orig * 3.0


def named_otherwise(model):
    own = model.embeddings.norm._parameters
    own["weight"], own["bias"] = own["bias"], own["weight"]


CHANGES = [
    word_pruned, norm_pruned_again, named_otherwise, word_written, word_moved, new_position,
    new_type, new_norm, eps_set, new_embeddings, embeddings_hooked, dropout_hooked,
    dropout_replaced, forward_replaced, pooler_written, pooler_changed, pooler_moved, new_pooler,
    pooler_hooked, pooler_replaced,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_seen(change):
    model, ids = drawn_model(), torch.randint(1, VOCABULARY, (2, 20))
    types = torch.randint(0, TYPES, (2, 20))
    before = run(model, ids, None, types)
    change(model)
    after = run(model, ids, None, types)
    assert not same(before, after)
    assert same(after, by_definition(model, ids, None, types))


def test_a_class_that_computes_something_else(monkeypatch):
    model, ids = drawn_model(), torch.randint(1, VOCABULARY, (2, 20))
    before, forward = run(model, ids), bert.Embeddings.forward
    monkeypatch.setattr(bert.Embeddings, "forward", lambda *args: forward(*args) * 0.5)
    after = run(model, ids)
    assert not same(before, after)
    assert same(after, by_definition(model, ids))


@pytest.mark.parametrize("width", [16, 40, 96])
@pytest.mark.parametrize("which", ["embeddings", "pooler"])
def test_a_part_of_another_width_is_refused(width, which):
    """Where memory would be read past its end."""
    model, ids = drawn_model(), torch.randint(1, VOCABULARY, (2, 20))
    run(model, ids)
    config = dataclasses.replace(model.config, hidden_size=width, num_attention_heads=1)
    if which == "embeddings":
        model.embeddings = bert.Embeddings(config).eval()
    else:
        model.pooler = blocks.Linear(width, 48)
        model.pooler.prepack()
    with pytest.raises((ValueError, RuntimeError)):
        run(model, ids)


@pytest.mark.parametrize("name", ["triton", "cuda", "eager"])
def test_ids_elsewhere_are_another_backends(name):
    """As on a GPU, which may be asked for by a name that no CPU has."""
    ids, model = torch.ones(1, 16, dtype=torch.int64, device="meta"), drawn_model()
    with torch.no_grad(), bert_fast.use_backend(name):
        assert model.one_call.from_ids(model, ids, *[None] * 6) is None
        assert not backends.all_choose("cpu", ops.encoder.ALL_OPS, "cpu", torch.float32)


def test_embeddings_in_training_drop_out():
    model, ids = drawn_model(), torch.randint(1, VOCABULARY, (2, 20))
    wanted = run(model, ids)
    model.embeddings.dropout.train()
    assert not same(run(model, ids), run(model, ids))
    model.embeddings.dropout.eval()
    assert same(run(model, ids), wanted)


def test_gradients_and_autocast_and_other_backends_take_the_modules(calls):
    model, ids = drawn_model(), torch.randint(1, VOCABULARY, (2, 20))
    run(model, ids)
    calls.clear()
    model(ids).pooler_output.sum().backward()
    assert model.embeddings.word.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        run(model, ids)
    with bert_fast.use_backend("eager"):
        run(model, ids)
    run(model, ids, torch.ones_like(ids), capacity=40)
    assert "forward" not in calls


def test_a_model_without_pooler():
    model = drawn_model()
    model.pooler = None
    assert run(model, torch.ones(1, 16, dtype=torch.int64)).pooler_output is None
