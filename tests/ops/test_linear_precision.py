"""Packed products in bf16 and int8, of every instruction set, with the instructions for them that
this processor has and without, and on AMX, emulated."""

import amx_host
import pytest
import torch
from conftest import ISAS, same_bits_at_any_thread_count
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bert_fast import _C, ops
from bert_fast.backends import cpu
from bert_fast.models.workspace import Workspace

LOWER = ["bfloat16", "int8"]
compiled = _C
drawn = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


BASE = [f"{isa}_base" for isa in ISAS if isa in ("avx512", "avx2")]


@pytest.fixture(params=[*ISAS, *BASE, "amx emulated"], autouse=True)
def isa(request, monkeypatch):
    if request.param == "amx emulated":
        monkeypatch.setattr("test_linear_precision._C", amx_host.use(monkeypatch))
        yield request.param
        return
    best = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    if "base" in request.param:
        assert not _C.linear_is_fast(cpu.PRECISIONS["int8"])
    yield request.param
    _C.set_cpu_isa(best)


def product(packed, x, weight, bias=None, approximate=None):
    out = torch.full((x.shape[0], weight.shape[0]), float("nan"))
    return packed.forward(x, weight, bias, approximate, out, Poisoned())


class Poisoned(Workspace):
    """Whoever reads of it what nobody wrote, sees NaN."""

    def take(self, *args):
        return super().take(*args).fill_(float("nan"))


sizes = dict(
    rows=st.integers(0, 40), depth=st.integers(1, 900), columns=st.integers(1, 100),
    with_bias=st.booleans(),
)  # fmt: skip
# 1024 in bf16 and 2048 in int8: converted rows that begin 2 KB apart are laid out further apart.
deeper = sizes | dict(depth=st.integers(1, 900) | st.sampled_from([1024, 2048]))


@drawn
@given(precision=st.sampled_from(LOWER), **sizes)
def test_exact_on_integers(precision, rows, depth, columns, with_bias):
    """Integers of 8 bits are rounded to themselves, and their sums are exact in fp32 too: any
    saturation, any element out of its place would show."""
    x = torch.randint(-100, 156, (rows, depth)).float()
    x[:, -1] = -100
    if depth > 1:
        x[:, 0] = 155  # 255 steps: the row's scale is 1
    elif precision == "int8":
        x.fill_(-255)
    weight = torch.randint(-127, 128, (columns, depth)).float()
    weight[:, -1] = 127
    bias = torch.randint(-9, 10, (columns,)).float() if with_bias else None
    packed = ops.pack_weight(weight, precision)
    wanted = x.double() @ weight.double().t() + (0 if bias is None else bias)
    found = product(packed, x, weight, bias)
    if precision == "bfloat16":
        assert torch.equal(found.double(), wanted)
    else:  # scales are 1 but for the rounding of 255 / 255 and 127 / 127
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-4)


@drawn
@given(precision=st.sampled_from(LOWER), **sizes)
def test_extremes_do_not_saturate(precision, rows, depth, columns, with_bias):
    x, weight = torch.full((rows, depth), 255.0), torch.full((columns, depth), -127.0)
    found = product(ops.pack_weight(weight, precision), x, weight)
    wanted = torch.full_like(found, -127.0 * 255.0 * depth)
    # An fp32 sum of so many equal numbers, in any order, and the scales.
    rtol = (depth + 4) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=0)


@drawn
@given(**deeper)
def test_bfloat16_is_as_right_as_torchs(rows, depth, columns, with_bias):
    x, weight = torch.randn(rows, depth), torch.randn(columns, depth)
    bias = torch.randn(columns) if with_bias else None
    exact = x.bfloat16().double() @ weight.bfloat16().double().t()
    exact += 0 if bias is None else bias
    found = product(ops.pack_weight(weight, "bfloat16"), x, weight, bias)
    # What is left once x and W are rounded: fp32 sums, in any order.
    bound = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1) * 2e-6 + 1e-6
    assert ((found.double() - exact).abs() <= bound).all()


@drawn
@given(factors=st.booleans(), **deeper)
def test_int8_rounds_rows_and_columns(factors, rows, depth, columns, with_bias):
    """Within what rounding to the nearest of 255 steps, and of 254, can make of each product."""
    x, weight = torch.randn(rows, depth) + 0.3, torch.randn(columns, depth)
    bias = torch.randn(columns) if with_bias else None
    factor = torch.rand(depth) + 0.5 if factors else None
    found = product(ops.pack_weight(weight, "int8", factor), x, weight, bias)
    f = torch.ones(depth) if factor is None else factor
    xf, wf = (x * f).double(), (weight / f).double()
    step_x = (xf.amax(1).clamp(min=0) - xf.amin(1).clamp(max=0)) / 255
    step_w = wf.abs().amax(1) / 127
    exact = xf @ wf.t() + (0 if bias is None else bias)
    # |x w - (x + a)(w + b)| with |a| a step of x at most (its zero is rounded, too), |b| half one.
    bound = step_x[:, None] * (wf.abs() + step_w[:, None] / 2).sum(1) + (
        xf.abs().sum(1)[:, None] * step_w / 2
    )
    assert ((found.double() - exact).abs() <= bound * 1.001 + 1e-5).all()


@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(precision, approximate):
    x, weight, bias = torch.randn(9, 70), torch.randn(45, 70) / 8, torch.randn(45)
    packed = ops.pack_weight(weight, precision)
    before = product(packed, x, weight, bias)
    wanted = ops.gelu(before, approximate=approximate, backend="cpu")
    torch.testing.assert_close(product(packed, x, weight, bias, approximate), wanted)


@drawn
@given(precision=st.sampled_from(["float32", *LOWER]), others=st.integers(0, 300))
def test_a_row_depends_on_nothing_else(precision, others):
    if _C.linear_kind(cpu.PRECISIONS[precision]) == "amx":
        return  # where that is so, docs say that it is not with AMX
    x, weight = torch.randn(others + 1, 400), torch.randn(70, 400)
    packed = ops.pack_weight(weight, precision)
    alone = product(packed, x[-1:].clone(), weight)
    assert torch.equal(product(packed, x, weight)[-1:], alone)


@pytest.mark.parametrize("precision", LOWER)
def test_threads(precision):
    x, weight = torch.randn(333, 200), torch.randn(130, 200)
    packed = ops.pack_weight(weight, precision)
    same_bits_at_any_thread_count(lambda: product(packed, x, weight))


@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_not_hidden(precision, value):
    x, weight = torch.randn(3, 50), torch.randn(20, 50)
    x[1, 17] = value
    found = product(ops.pack_weight(weight, precision), x, weight)
    assert not found[1].isfinite().any()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("precision", LOWER)
def test_zeros(precision):
    x, weight, bias = torch.zeros(4, 30), torch.randn(7, 30), torch.randn(7)
    weight[3] = 0
    packed = ops.pack_weight(weight, precision)
    assert torch.equal(product(packed, x, weight, bias), bias.expand(4, 7))
    assert (product(packed, torch.randn(4, 30), weight)[:, 3] == 0).all()


@pytest.mark.parametrize("precision", LOWER)
def test_a_changed_weight_is_packed_anew(precision):
    x, weight = torch.randn(5, 64), torch.randn(32, 64)
    packed = ops.pack_weight(weight, precision)
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(
        product(packed, x, weight), product(ops.pack_weight(weight, precision), x, weight)
    )
    weight.data.add_(1)  # seen by some of its numbers
    assert torch.equal(
        product(packed, x, weight), product(ops.pack_weight(weight, precision), x, weight)
    )


@drawn
@given(
    precision=st.sampled_from(["float32", *LOWER]), depth=st.integers(1, 70),
    columns=st.integers(1, 70),
)  # fmt: skip
def test_elements_come_back(precision, depth, columns):
    x, weight = torch.randn(3, depth), torch.randn(columns, depth)
    packed = ops.pack_weight(
        weight, precision, torch.rand(depth) + 1 if precision == "int8" else None
    )
    again = ops.unpacked_weight(*packed.elements())
    for found, wanted in zip(again.elements(), packed.elements(), strict=True):
        assert (found is None and wanted is None) or torch.equal(found, wanted)
    gone = torch.empty_like(weight, device="meta")
    assert torch.equal(product(again, x, gone), product(packed, x, weight))


def test_sizes():
    """What the docs say of memory."""
    size = {name: _C.linear_packed_size(code, 1536, 384) for name, code in cpu.PRECISIONS.items()}
    whole = 4 * 1536 * 384
    assert size["float32"] == whole * (2.5 if _C.linear_kind(0) == "amx" else 1)
    assert size["bfloat16"] == whole // 2
    assert whole / 4 < size["int8"] < whole / 4 * 1.03


@pytest.mark.parametrize("precision", ["float32", *LOWER])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_a_row_has_the_same_bits_in_any_group(precision, approximate):
    """Rows go through GELU some at a time, the last ones one by one."""
    if _C.linear_kind(cpu.PRECISIONS[precision]) == "amx":
        pytest.skip("docs say that with AMX it is not so")
    x, weight, bias = torch.randn(13, 90), torch.randn(45, 90) / 5, torch.randn(45)
    packed = ops.pack_weight(weight, precision)
    together = product(packed, x, weight, bias, approximate)
    for first, count in ((0, 1), (3, 2), (5, 3), (1, 4), (6, 5), (2, 7), (4, 9)):
        some = product(packed, x[first : first + count].clone(), weight, bias, approximate)
        assert torch.equal(some, together[first : first + count])


@drawn
@given(
    factors=st.booleans(), approximate=st.sampled_from([None, "none", "tanh"]),
    **sizes
    | {
        "rows": st.one_of(st.sampled_from([1, 16, 17, 32, 33, 256, 257]), st.integers(1, 300)),
        "depth": st.integers(1, 2000),
    },
)  # fmt: skip
def test_int8_has_the_same_bits_with_amx(
    isa, factors, approximate, rows, depth, columns, with_bias
):
    """As by AVX-512's own instructions, or AVX2's: same scales, exact sums, same last steps."""
    if not _C.linear_kind(cpu.PRECISIONS["int8"]).startswith("amx"):
        pytest.skip("no AMX here; its emulation is another of these")
    x, weight = torch.randn(rows, depth) + 0.3, torch.randn(columns, depth) / depth**0.5
    bias = torch.randn(columns) if with_bias else None
    factor = torch.rand(depth) + 0.5 if factors else None
    ours = product(ops.pack_weight(weight, "int8", factor), x, weight, bias, approximate)
    with amx_host.without():
        wanted = product(ops.pack_weight(weight, "int8", factor), x, weight, bias, approximate)
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("precision", LOWER)
def test_amx_has_room_for_whole_tiles(isa, precision):
    """Of 16 rows of 64 bytes: it reads past the last row of x."""
    if isa != "amx emulated":
        pytest.skip("others read no whole tiles")
    depth = {"bfloat16": 33, "int8": 65}[precision]  # two tiles
    for rows, tiles in ((1, 2), (16, 2), (17, 4), (33, 6)):
        size = _C.linear_scratch_size(cpu.PRECISIONS[precision], rows, depth, 1)
        assert size >= tiles * 16 * 64


def test_the_emulation_has_the_processors_bits(isa):
    """int8 is held to VNNI's; whether bfloat16's order of sums and denormals are the unit's, only
    this says."""
    if isa != "amx emulated" or compiled.linear_kind(cpu.PRECISIONS["bfloat16"]) != "amx_bf16":
        pytest.skip("needs a processor with AMX; the emulation's numbers are tested without one")
    x, weight = torch.randn(37, 300), torch.randn(70, 300)
    x[3] *= 2.0**-126
    found = product(ops.pack_weight(weight, "bfloat16"), x, weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_C", compiled)
        assert torch.equal(found, product(ops.pack_weight(weight, "bfloat16"), x, weight))


def test_amx_takes_denormals_for_zero(isa):
    """As Intel's manual says of it: nobody relies on that, but the emulation does the same."""
    if isa != "amx emulated":
        pytest.skip("others do not")
    weight = torch.ones(3, 40)
    packed = ops.pack_weight(weight, "bfloat16")
    assert (product(packed, torch.full((2, 40), 2.0**-127), weight) == 0).all()
    assert (product(packed, torch.full((2, 40), 2.0**-126), weight) == 40 * 2.0**-126).all()
