"""Attention whose products round their factors to bfloat16, of every instruction set and on AMX,
emulated."""

import amx_host
import pytest
import torch
import transformers
from conftest import ISAS, assert_within, cu_seqlens, same_bits_at_any_thread_count
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import bert_fast
from bert_fast import _C, backends, models, ops
from bert_fast.backends import cpu

drawn = settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=[*ISAS, "avx512_base", "amx emulated"])
def rounds(request, monkeypatch):
    """Whether the instruction set has such products."""
    if request.param == "amx emulated":
        amx_host.use(monkeypatch)
        yield True
        return
    if request.param.removesuffix("_base") not in ISAS:
        pytest.skip("this processor has no AVX-512")
    best = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield _C.linear_kind(1) in ("avx512_bf16", "amx_bf16")
    _C.set_cpu_isa(best)


def rounded(*args, **options):
    return ops.attention_qkv(*args, **options, precision="bfloat16", backend="cpu")


SHAPES = [
    ([1, 5], 2, 16), ([7, 0, 1, 63], 3, 64), ([127, 40], 2, 32), ([300], 1, 64),
    ([130, 129], 2, 80), ([17, 5], 1, 256), ([33, 2], 1, 20), ([5, 31], 3, 31),
    ([16, 32, 15], 2, 1),
    ([0, 0], 2, 64), ([], 2, 64),
]  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lengths", "num_heads", "head_dim"), SHAPES)
def test_errs_no_more_than_torch_in_bfloat16(rounds, lengths, num_heads, head_dim, causal):
    qkv = torch.randn(sum(lengths), 3, num_heads, head_dim)
    bias, cu = torch.randn(3, num_heads, head_dim) / 2, cu_seqlens(lengths)
    longest = max(lengths, default=0)
    table = torch.randn(num_heads, longest, longest)

    def eager(dtype):
        options = dict(bias=bias.to(dtype), position_bias=table.to(dtype), causal=causal)
        return ops.attention_qkv(qkv.to(dtype), cu, **options, backend="eager")

    options = dict(bias=bias, position_bias=table, causal=causal, return_lse=True)
    ours, lse = rounded(qkv, cu, **options)
    truth = eager(torch.float64)
    # In PyTorch's dtype for the allowance: what float32 adds to ours is next to nothing.
    assert_within(ours.bfloat16(), eager(torch.bfloat16), truth, draws=len(qkv) * num_heads or 1)
    exact, exact_lse = ops.attention_qkv(qkv, cu, **options, backend="cpu")
    if not rounds:
        assert torch.equal(ours, exact)
    elif len(qkv):
        assert not torch.equal(ours, exact)
        torch.testing.assert_close(lse, exact_lse, rtol=0.02, atol=0.1)


@drawn
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=3), num_heads=st.integers(1, 3),
    head_dim=st.integers(1, 70),
)  # fmt: skip
def test_each_number_in_its_place(rounds, lengths, num_heads, head_dim):
    """Scores of which one is far above the others choose a key: its value, whose 8 bits bfloat16
    has, is the result, to the bit. And what is past a row's end counts for nothing."""
    total = sum(lengths)
    qkv = torch.randint(-100, 100, (total, 3, num_heads, head_dim)).float()
    cu, wanted = cu_seqlens(lengths), torch.empty(total, num_heads, head_dim)
    table = torch.zeros(num_heads, max(lengths), max(lengths))
    qkv[:, 0] = 0  # the table alone decides
    chosen = torch.randint(0, max(lengths) + 1, (num_heads, max(lengths)))
    for head in range(num_heads):
        for i, length in enumerate(lengths):
            begin = int(cu[i])
            for row in range(length):
                key = int(chosen[head, row]) % min(n for n in lengths if n > row)
                table[head, row, key] = 300.0
                wanted[begin + row, head] = qkv[begin + key, 2, head]
    assert torch.equal(rounded(qkv, cu, position_bias=table), wanted)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 127, 128, 129, 200])
def test_the_mean_of_integers(rounds, length):
    """Equal scores weigh all keys alike: sums of integers are exact, in whatever order."""
    qkv, cu = torch.randint(-9, 10, (2 * length, 3, 2, 40)).float(), cu_seqlens([length, length])
    qkv[:, 0] = 0
    means = qkv[:, 2].double().view(2, length, 2, 40).mean(1, keepdim=True)
    found = rounded(qkv, cu).view(2, length, 2, 40).double()
    torch.testing.assert_close(found, means.expand_as(found), rtol=3e-7, atol=0)


def test_not_finite_where_it_is_and_nowhere_else(rounds):
    qkv, cu = torch.randn(60, 3, 2, 32), cu_seqlens([20, 40])
    qkv[3, 0, 1] = float("nan")  # a query
    qkv[30, 2, 0, 5] = float("inf")  # a value
    out = rounded(qkv, cu)
    odd = ~torch.isfinite(out)
    wanted = torch.zeros_like(odd)
    wanted[3, 1] = True
    wanted[20:, 0, 5] = True
    assert torch.equal(odd, wanted)


def test_hidden_keys_and_rows_past_the_end(rounds):
    qkv, cu = torch.randn(50, 3, 2, 24), cu_seqlens([9, 33])
    table = torch.zeros(2, 33, 33)
    table[:, 4], table[:, :, 7] = -torch.inf, -torch.inf
    out = rounded(qkv, cu, position_bias=table, padded_tail=True)
    assert not out[4].any()
    assert not out[9 + 4].any()
    assert not out[42:].any()
    assert out[:4].abs().sum(-1).all()
    qkv[[7, 16], 2] += 100.0
    assert torch.equal(rounded(qkv, cu, position_bias=table, padded_tail=True), out)


def test_a_sequence_depends_on_no_other(rounds):
    lengths = [33, 1, 140, 12]
    qkv, cu = torch.randn(sum(lengths), 3, 2, 32), cu_seqlens(lengths)
    together = rounded(qkv, cu)
    for begin, length in zip(cu.tolist(), lengths, strict=False):
        alone = rounded(qkv[begin : begin + length], cu_seqlens([length]))
        assert torch.equal(alone, together[begin : begin + length])
    same_bits_at_any_thread_count(lambda: (rounded(qkv, cu),))


def test_queries_of_other_sequences(rounds):
    """Cross-attention, any strides, a result's own memory."""
    q, kv = torch.randn(11, 2, 32), torch.randn(2, 90, 2, 40)[..., 3:35]
    cu, cu_k, out = cu_seqlens([4, 7]), cu_seqlens([80, 10]), torch.full((11, 2, 32), torch.nan)
    options = dict(softmax_scale=-0.3, precision="bfloat16", backend="cpu")
    found = ops.attention(q, *kv, cu, cu_k, out=out, **options)
    assert found is out
    truth = ops.attention(q.double(), *kv.double(), cu, cu_k, softmax_scale=-0.3, backend="eager")
    given_bf16 = [t.bfloat16() for t in (q, *kv)]
    torchs = ops.attention(*given_bf16, cu, cu_k, softmax_scale=-0.3, backend="eager")
    assert_within(found.bfloat16(), torchs, truth, draws=22)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(precision="int8"), "precision must be 'float32' or 'bfloat16', not 'int8'"),
        (dict(backend="eager"), "torch.float32 on eager"),
        (dict(dropout_p=0.1, seed=1), "torch.float32 on cpu, dropout"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(change, message):
    qkv, cu = torch.randn(4, 3, 1, 8), cu_seqlens([4])
    asked = dict(precision="bfloat16", backend="cpu") | change
    with pytest.raises(ValueError, match=message):
        ops.attention_qkv(qkv, cu, **asked)
    with pytest.raises(ValueError, match=message):
        ops.attention(*qkv.unbind(1), cu, **asked)


def test_other_tensors_are_refused():
    qkv, cu = torch.randn(4, 3, 1, 8), cu_seqlens([4])
    with pytest.raises(ValueError, match=r"inference, .* not for torch.bfloat16 on cpu"):
        rounded(qkv.bfloat16(), cu)
    with pytest.raises(ValueError, match=r"not for torch\.float32 on cpu, with gradients"):
        rounded(qkv.requires_grad_(), cu)


def test_whoever_looks_on_sees_it():
    """A traced call rounds as the call does, of other inputs, too."""
    qkv, other = torch.randn(2, 6, 3, 2, 16)
    cu = cu_seqlens([6])

    def run(qkv):
        return rounded(qkv, cu, max_seqlen=6)

    wanted = run(other)
    assert torch.equal(make_fx(run)(qkv)(other), wanted)
    assert torch.equal(torch.jit.trace(run, qkv)(other), wanted)
    assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(other), wanted)
    with FakeTensorMode() as mode:
        fake = run(mode.from_tensor(qkv)) if (cu := mode.from_tensor(cu)) is not None else None
    assert fake.shape == wanted.shape


@pytest.fixture
def asked(monkeypatch):
    """What attention was asked for, call by call."""
    found, real = [], cpu.attention_shape

    def note(*args, precision="float32", **options):
        found.append(precision)
        return real(*args, precision=precision, **options)

    monkeypatch.setattr(cpu, "attention_shape", note)
    return found


def model(dtype=None):
    made = bert_fast.BertModel(
        bert_fast.BertConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64,
        )
    ).eval()  # fmt: skip
    return made if dtype is None else made.for_inference(dtype)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(None, "float32"), ("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "bfloat16")],
)
def test_models_ask_where_their_products_round(asked, dtype, wanted):
    served, ids = model(dtype), torch.randint(60, (2, 9))
    with torch.no_grad():
        asked.clear()  # of calibration
        served(ids, output_hidden_states=True)
    assert asked == [wanted] * 2


def test_models_ask_nobody_who_cannot(asked):
    made, ids = model(), torch.randint(60, (2, 9))
    for linear in made.modules():
        if isinstance(linear, models.blocks.Linear):
            linear.packed = ops.pack_weight(linear.weight, "bfloat16")
    with torch.no_grad(), backends.use_backend("eager"):
        made(ids)
        assert not asked
    with torch.no_grad():
        made.train()(ids)  # with dropout
    assert asked == ["float32"] * 2


def test_one_product_in_float32_keeps_attention_there(asked):
    """Of queries, keys and values one that int8 would harm: in one call and layer by layer."""
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    made, ids = transformers.BertModel(config).eval(), torch.randint(60, (2, 9))
    bert_fast.accelerate(made, dtype="bfloat16")
    layers, rounds = made.encoder.layer, ["bfloat16"] * 2
    for wanted in (rounds, ["float32", "bfloat16"]):
        asked.clear()
        with torch.no_grad():
            found = made(ids, output_hidden_states=True).hidden_states[-1]
            assert asked == wanted
            assert torch.equal(made(ids).last_hidden_state, found)
        key = layers[0].attention.self.key
        layers[0]._bert_fast.packed["attention.self.key"] = ops.pack_weight(key.weight)
        layers[0]._bert_fast.changed()
