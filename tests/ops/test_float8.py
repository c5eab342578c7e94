"""Rows in float8: the backend that has a kernel against the definition, the definition against all
253 numbers of e4m3, products against torch's own."""

import contextlib

import pytest
import torch
from conftest import DTYPES, TRITON, assert_within
from torch._subclasses.fake_tensor import FakeTensorMode

import bert_fast
from bert_fast import backends, ops
from bert_fast.ops import reference

SHAPES = [(1, 768), (9, 64), (5, 77), (33, 5), (3, 1), (0, 32), (2, 1500)]


@pytest.fixture(params=["eager", *TRITON])
def backend(request):
    """The others do as eager does, which calls whatever op they have."""
    name, _, on_gpu = request.param.partition("-")
    on = torch.device("cuda") if on_gpu else contextlib.nullcontext()
    if on_gpu and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    with bert_fast.use_backend(name), on:
        yield name


def drawn(shape, dtype=torch.bfloat16, device=None):
    """Rows of all sizes, some columns far above the others, among them zeros and the largest."""
    x = torch.randn(shape) * 2.0 ** torch.randint(-30, 30, (shape[0], 1)).float()
    x = (x * torch.where(torch.rand(shape) < 0.02, 64.0, 1.0)).clamp(-6e4, 6e4)
    x[1:2] = 0
    x[2:3, :1] = -torch.finfo(dtype).max
    return x.to(dtype).to(device or torch.get_default_device())


def assert_same(found, wanted):
    assert found[0].dtype == torch.float8_e4m3fn
    assert found[1].dtype == torch.float32
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


def e4m3():
    """Its finite numbers, of sign, exponent and mantissa (Micikevicius et al. 2022, table 1)."""
    numbers = [
        (1 + m / 8) * 2.0 ** (e - 7) if e else m / 8 * 2.0**-6
        for e in range(16)
        for m in range(8 - (e == 15))
    ]
    return torch.tensor([-n for n in numbers[:0:-1]] + numbers, dtype=torch.float64)


def to_nearest(x):
    """``x`` (rows, width) in float64, rounded naively to e4m3 by row, and times its scale again."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    numbers = e4m3()
    after = torch.bucketize(x / scale, numbers).clamp(1, len(numbers) - 1)
    low, high = numbers[after - 1], numbers[after]
    return torch.where(x / scale - low < high - x / scale, low, high) * scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_definition_takes_the_nearest(shape):
    x = drawn(shape)
    elements, scale = reference.float8(x)
    assert elements.float().isfinite().all()
    usual = x.abs().amax(-1) > 2.0**-100
    assert (elements.float().abs().amax(-1)[usual] == 448).all()
    assert (elements.float()[~usual] == 0).all()
    exact = x.double()
    error = (elements.double() * scale[:, None].double() - exact).abs()
    nearest = (to_nearest(exact) - exact).abs()
    # float32's own roundings: of the scale, of its inverse, of the product.
    assert (error <= nearest + exact.abs() * 2.0**-20).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows(backend, shape, dtype):
    x = drawn(shape, dtype)
    assert_same(ops.float8(x), reference.float8(x))


def test_what_is_not_finite_is_seen(backend):
    x = drawn((6, 40))
    x[3, 7], x[4, 1], x[5, 2:4] = torch.nan, -torch.inf, torch.tensor([torch.nan, torch.inf])
    rows = ops.float8(x)
    assert_same(rows, reference.float8(x))
    assert rows.elements.float().isnan().any(-1).tolist() == [False] * 3 + [True] * 3
    assert rows.elements[3].float().isnan().sum() == 1  # the others are what they were
    weight = ops.Float8Weight(torch.randn(16, 40))
    product = reference.float8_product(*rows, *weight.rows)
    assert product.isnan().all(-1).tolist() == [False] * 3 + [True] * 3
    assert product[:2].isfinite().all()


def test_ties_and_subnormals(backend):
    """Between each two of its numbers that are neighbours, and just beside; ties go to even."""
    numbers = e4m3().float().to(torch.get_default_device())
    middle = (numbers[1:] + numbers[:-1]) / 2
    x = torch.stack([middle, torch.nextafter(middle, middle + 1), torch.nextafter(middle, -middle)])
    x[:, 0] = 448.0  # so that each row's scale is 1
    rows = ops.float8(x)
    assert_same(rows, (x.to(torch.float8_e4m3fn), torch.ones(3)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(backend, shape, approximate):
    x, bias = drawn(shape), torch.randn(shape[1])
    for b in (None, bias, bias.bfloat16()):
        wanted = reference.float8(ops.gelu(x, b, approximate=approximate))
        assert_same(ops.gelu_float8(x, b, approximate), wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(backend, shape):
    x, residual = torch.randn(2, *shape).bfloat16().double()
    weight, bias, linear_bias = torch.randn(3, shape[1]).bfloat16().double()
    for added in (linear_bias, None):

        def run(dtype, op, added=added):
            given = [None if t is None else t.to(dtype) for t in (added, x, weight, bias, residual)]
            return op(*given[1:], given[0], 1e-5)

        found = run(torch.bfloat16, ops.layer_norm_float8)
        assert_same(found.rows, reference.float8(found.value))
        eager, truth = (run(d, reference.layer_norm) for d in (torch.bfloat16, torch.float64))
        assert_within(found.value, eager, truth)


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_torchs_product_is_the_definitions(rows, with_bias):
    """In the same call, but on a CPU."""
    x, weight = ops.float8(torch.randn(rows, 48)), ops.Float8Weight(torch.randn(32, 48))
    bias = torch.randn(32).bfloat16() if with_bias else None
    wide, by = (r.elements.double() * r.scale[:, None].double() for r in (x, weight.rows))
    truth = wide @ by.t() + (0 if bias is None else bias)
    wanted = weight.product(x, bias)
    assert_within(wanted, truth.bfloat16(), truth)
    try:
        found = ops.scaled_product(x, weight.rows, bias)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch has no such product on a CPU: {error}")
    assert_within(found, wanted, truth)


def test_torch_takes_what_a_gpu_is_given():
    """Layouts and sizes, by torch's own rules, which it checks before it asks for a GPU."""

    def product(rows, width, out_width):
        x, weight = (
            ops.Rows(torch.empty(n, width, dtype=torch.float8_e4m3fn), torch.empty(n))
            for n in (rows, out_width)
        )
        return ops.scaled_product(x, weight, torch.empty(out_width, dtype=torch.bfloat16))

    with FakeTensorMode(), torch.device("cuda"):
        for sizes in ((1, 16, 16), (7, 768, 2304), (33, 64, 32)):
            found = product(*sizes)
            assert (found.shape, found.dtype) == ((sizes[0], sizes[2]), torch.bfloat16)
        for sizes in ((7, 24, 32), (7, 32, 24)):
            with pytest.raises(RuntimeError, match="16"):
                product(*sizes)


def test_what_does_not_fit_is_refused():
    x, vector = torch.randn(3, 8), torch.randn(8)
    for error, message, call in (
        (ValueError, r"x must be \(rows, width\)", lambda: ops.float8(x[0])),
        (TypeError, "x must be floating point", lambda: ops.float8(x.long())),
        (ValueError, "bias must have shape", lambda: ops.gelu_float8(x, vector[:7])),
        (ValueError, "approximate must be", lambda: ops.gelu_float8(x, vector, "sigmoid")),
        (ValueError, "residual must have x's shape",
         lambda: ops.layer_norm_float8(x, vector, vector, x[:2])),
        (TypeError, "they must agree",
         lambda: ops.layer_norm_float8(x, vector, vector, x.double())),
        (ValueError, "linear_bias must have shape",
         lambda: ops.layer_norm_float8(x, vector, vector, x, vector[:3])),
        (RuntimeError, "float8 is for inference", lambda: ops.float8(x.clone().requires_grad_())),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


def test_chips_without_e4m3(monkeypatch):
    """`auto` composes there; Triton asked for by name says what it needs."""
    choice = backends.choice
    monkeypatch.setattr(choice, "interpreted", lambda name: False)
    monkeypatch.setattr(choice, "why_unavailable", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, ours in (((8, 6), False), ((8, 9), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        given = "float8", "cuda", torch.bfloat16, False
        assert choice.choose(*given, size=768) == ("triton" if ours else "eager")
        if not ours:
            with pytest.raises(bert_fast.BackendUnavailableError, match=r"8\.9 and later"):
                choice.choose(*given, "triton", 768)
