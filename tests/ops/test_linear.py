"""fp32 linear layers with packed weights: every instruction set's kernel, AMX's by three bf16
parts and their scheme, and prepacked models."""

import copy
import math
import mmap
import pickle
import sys
from pathlib import Path

import amx_host
import pytest
import torch
from conftest import assert_within, same_bits_at_any_thread_count
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bert_fast
from bert_fast import _C, ops
from bert_fast.backends import cpu
from bert_fast.models.blocks import Linear
from bert_fast.models.workspace import Workspace

KINDS = ["amx", "amx emulated", "avx512", "avx2", "generic"]


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    """Each layout of packed weights that this machine has, AMX's on any. Its own is AVX-512's where
    it has it."""
    if request.param == "amx emulated":
        monkeypatch.setattr("test_linear._C", amx_host.use(monkeypatch))
        yield "amx"
        return
    best = _C.cpu_isa()
    try:
        isa = {"amx": "avx512", "avx512": "avx512_no_amx"}.get(request.param, request.param)
        _C.set_cpu_isa(isa)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    if _C.linear_kind(0) != request.param:
        _C.set_cpu_isa(best)
        pytest.skip(f"this processor, kernel or compiler gives {_C.linear_kind(0)} instead")
    yield request.param
    _C.set_cpu_isa(best)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_amx_is_chosen_only_where_the_processor_has_it():
    """The emulation is for tests."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    for precision, flag in {"float32": "bf16", "bfloat16": "bf16", "int8": "int8"}.items():
        chosen = _C.linear_kind(cpu.PRECISIONS[precision]).startswith("amx")
        assert not chosen or f"amx_{flag}" in flags


def split(x):
    parts, rest = [], x
    for _ in range(3):
        parts.append(rest.bfloat16().float())
        rest = rest - parts[-1]
    assert rest.eq(0).all()  # 8 bits each make 24: nothing is left
    return parts


def test_the_scheme_itself_is_fp32():
    """Six of nine products of the parts, exactly summed, lose less than fp32's own rounding. Runs
    on any processor."""
    x, w = torch.randn(64, 96), torch.randn(96, 48)
    exact = x.double() @ w.double()
    (xh, xm, xl), (wh, wm, wl) = ([p.double() for p in split(t)] for t in (x, w))
    six = xh @ wh + xh @ wm + xm @ wh + xh @ wl + xm @ wm + xl @ wh
    bound = x.double().abs() @ w.double().abs() * 2.0**-24
    assert ((six - exact).abs() <= bound).all()


def check(rows, in_features, out_features, approximate, with_bias):
    x, weight = torch.randn(rows, in_features), torch.randn(out_features, in_features)
    bias = torch.randn(out_features) if with_bias else None
    packed = ops.pack_weight(weight)
    out = torch.full((rows, out_features), math.nan)
    packed.forward(x, weight, bias, approximate, out, Workspace())

    def torchs(x, weight, bias):
        y = torch.nn.functional.linear(x, weight, bias)
        return y if approximate is None else torch.nn.functional.gelu(y, approximate=approximate)

    truth = torchs(x.double(), weight.double(), None if bias is None else bias.double())
    assert_within(out, torchs(x, weight, bias), truth)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 40, 300])
@pytest.mark.parametrize(("in_features", "out_features"), [(40, 65), (800, 96)])
def test_rows_may_lie_apart(kind, rows, in_features, out_features):
    """As csrc/cpu/encoder.cpp lays them; nothing is written between."""
    x, weight = torch.randn(rows, in_features), torch.randn(out_features, in_features)
    packed, wanted = ops.pack_weight(weight), torch.empty(rows, out_features)
    packed.forward(x, weight, None, "none", wanted, Workspace())
    x_apart = torch.full((rows, in_features + 16), math.nan)
    x_apart[:, :in_features] = x
    apart = torch.full((rows, out_features + 16), math.nan)
    packed.forward(
        x_apart[:, :in_features], weight, None, "none", apart[:, :out_features], Workspace()
    )
    assert torch.equal(apart[:, :out_features], wanted)
    assert apart[:, out_features:].isnan().all()


@pytest.mark.parametrize("approximate", [None, "none", "tanh"])
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features"),
    [(16, 8, 16), (33, 33, 33), (17, 770, 31), (300, 64, 96), (513, 768, 65), (40, 1600, 257)],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_kernel(kind, rows, in_features, out_features, approximate, with_bias):
    check(rows, in_features, out_features, approximate, with_bias)


@pytest.mark.parametrize("rows", range(1, 16))
def test_few_rows(kind, rows):
    check(rows, 500, 300, "none", True)


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.sampled_from([0, 16, 17, 31, 32, 33, 64, 100, 257, 300]),
    in_features=st.integers(8, 900),
    out_features=st.integers(8, 300),
    approximate=st.sampled_from([None, "none", "tanh"]),
    with_bias=st.booleans(),
)
def test_drawn_shapes(kind, rows, in_features, out_features, approximate, with_bias):
    check(rows, in_features, out_features, approximate, with_bias)


def test_nothing_is_written_past_the_result(kind):
    """Columns that are no multiple of a panel: its padding has no place in y."""
    rows, width, columns = 37, 390, 77
    memory = torch.full((rows * columns + 64,), math.nan)
    weight, x = torch.randn(columns, width), torch.randn(rows, width)
    out = memory[: rows * columns].view(rows, columns)
    ops.pack_weight(weight).forward(x, weight, None, None, out, Workspace())
    assert out.isfinite().all()
    assert memory[rows * columns :].isnan().all()


def test_another_instruction_set_is_packed_anew():
    """A layout belongs to one instruction set: a change in between is seen."""
    x, weight = torch.randn(20, 50), torch.randn(70, 50)
    best, packed = _C.cpu_isa(), ops.pack_weight(weight)
    try:
        for isa in ("generic", best):
            _C.set_cpu_isa(isa)
            out = packed.forward(x, weight, None, None, torch.empty(20, 70), Workspace())
            torch.testing.assert_close(out, x @ weight.t(), rtol=0, atol=1e-4)
    finally:
        _C.set_cpu_isa(best)


def test_with_amx_few_rows_are_avx512s(kind):
    """To its bits; and from 32 on they are the unit's."""
    if kind != "amx":
        pytest.skip("no AMX here; its emulation is another of these")
    weight = torch.randn(70, 400)

    def product(x):
        return ops.pack_weight(weight).forward(
            x, weight, None, None, torch.empty(len(x), 70), Workspace()
        )

    for rows in (1, 31, 32):
        x = torch.randn(rows, 400)
        ours = product(x)
        with amx_host.without():
            assert torch.equal(product(x), ours) == (rows < 32)
    assert _C.linear_scratch_size(0, 31, 400, 2) == 0


@pytest.mark.parametrize("rows", [4, 36])
def test_infinities_stay_and_nan_is_seen(kind, rows):
    x, weight = torch.randn(rows, 40), torch.rand(8, 40) + 0.1
    x[1, 3], x[2, 5] = math.inf, math.nan
    out = ops.pack_weight(weight).forward(x, weight, None, None, torch.empty(rows, 8), Workspace())
    assert out[0].isfinite().all()
    assert out[3].isfinite().all()
    assert not out[1].isfinite().any()
    assert out[2].isnan().all()


def test_bitwise_the_same_at_any_thread_count(kind):
    x, weight = torch.randn(300, 384), torch.randn(530, 384)

    def run():
        packed = ops.pack_weight(weight)
        return (packed.forward(x, weight, None, None, torch.empty(300, 530), Workspace()),)

    same_bits_at_any_thread_count(run)


@pytest.mark.parametrize("approximate", [None, "none"])
def test_bitwise_a_row_depends_on_itself_alone(kind, approximate):
    """However many other rows there are, and whatever they hold."""
    x, weight, bias = torch.randn(300, 500), torch.randn(200, 500), torch.randn(200)
    packed = ops.pack_weight(weight)

    def product(rows):
        out = torch.empty(rows.shape[0], 200)
        return packed.forward(rows.contiguous(), weight, bias, approximate, out, Workspace())

    together = product(x)
    for first, count in [(0, 1), (7, 2), (31, 3), (100, 4), (100, 5), (3, 13), (150, 145)]:
        among = together[first : first + count]
        if _C.linear_kind(0) == "amx" and count < 32:  # fewer rows are AVX-512's
            among = product(x[first : first + 31])[:count]
        assert torch.equal(product(x[first : first + count]), among)


def model():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = bert_fast.BertConfig(vocab_size=40, intermediate_size=100, **sizes)
    return bert_fast.BertModel(config).eval()


@torch.no_grad()
def outputs(model, ids):
    return model(ids).last_hidden_state


def test_prepacked_model_follows_its_weights():
    """After an optimizer's step, load_state_dict, deepcopy, pickle: never a stale weight."""
    plain, ids = model(), torch.randint(1, 40, (3, 20))
    packed = copy.deepcopy(plain).prepack()
    assert packed.layers[0].attention.qkv.packed is not None
    assert isinstance(packed.layers[0].attention.qkv, Linear)

    def same():
        torch.testing.assert_close(outputs(packed, ids), outputs(plain, ids), rtol=0, atol=2e-6)

    same()
    with torch.no_grad():
        for either in (plain, packed):
            either.layers[1].feed_forward.down.weight.mul_(1.5)
    same()
    fresh = model()
    for either in (plain, packed):
        either.load_state_dict(fresh.state_dict())
    same()
    before = outputs(packed, ids)
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        with torch.no_grad():
            copied.layers[0].attention.out.weight.add_(1.0)
        assert not torch.equal(outputs(copied, ids), before)
        assert torch.equal(outputs(packed, ids), before)
    packed.double()
    assert outputs(packed, ids).dtype == torch.float64


def test_another_backend_is_obeyed(monkeypatch):
    packed, ids = model().prepack(), torch.randint(1, 40, (3, 20))
    wanted = outputs(packed, ids)

    def fail(*args):
        raise AssertionError("the packed weight was used")

    for kind, name in (
        (cpu.PackedWeight, "forward"), (cpu.PackedWeight, "of_first"), (cpu.Encoder, "forward"),
    ):  # fmt: skip
        monkeypatch.setattr(kind, name, fail)
    with bert_fast.use_backend("eager"):
        torch.testing.assert_close(outputs(packed, ids), wanted, rtol=0, atol=2e-6)
    with pytest.raises(AssertionError, match="was used"):
        outputs(packed, ids)


def test_prepacked_model_still_trains():
    packed, ids = model().prepack(), torch.randint(1, 40, (3, 20))
    before = outputs(packed, ids)
    packed(ids).last_hidden_state.square().mean().backward()
    torch.optim.SGD(packed.parameters(), lr=1.0).step()
    after = outputs(packed, ids)
    assert not torch.equal(before, after)
    packed.layers[0].attention.qkv.packed = None
    torch.testing.assert_close(outputs(packed, ids), after, rtol=0, atol=2e-6)


def test_memory_of_packed_weights():
    """Cache lines begin it; where the system has huge pages, one begins what is as large. It is as
    large as what it holds, and takes what is written."""
    from bert_fast.backends.memory import HUGE_PAGE, packed_memory

    for size in (4, 1000, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 5000):
        memory = packed_memory(size).fill_(7)
        assert memory.numel() == size
        assert memory.untyped_storage().nbytes() <= size + 64
        assert memory.data_ptr() % 64 == 0
        if size > HUGE_PAGE * 3 // 4 and hasattr(mmap, "MADV_HUGEPAGE"):
            assert memory.data_ptr() % HUGE_PAGE == 0
        assert bool((copy.deepcopy(memory) == 7).all())
