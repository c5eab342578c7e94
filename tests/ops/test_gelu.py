"""GELU with bias, erf and tanh: every backend against the float64 reference."""

import math

import pytest
import torch
from conftest import (
    DTYPES,
    HAS_GPU,
    KERNELS,
    assert_within,
    run_with_gradients,
    same_bits_at_any_thread_count,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import bert_fast
from bert_fast import ops

SHAPES = [(1, 16), (7, 3072), (63, 77), (513, 16), (0, 64), (2, 5, 33)]


def check(gradients, dtype, shape, approximate, with_bias, backend=None):
    x, dout = torch.randn(2, *shape, dtype=torch.float64) * 3
    if x.numel() < 100:  # far out PyTorch's is 0, by chance less wrong than 1e-14 for 1e-16
        x.clamp_(-4, 4)
    bias = torch.randn(shape[-1], dtype=torch.float64) if with_bias else None
    x, dout, bias = (t if t is None else t.to(dtype).double() for t in (x, dout, bias))

    def run(x, bias, backend=backend):
        return ops.gelu(x, bias, approximate=approximate, backend=backend)

    def eager(x, bias):
        return run(x, bias, "eager")

    assert_within(
        gradients(run, (x, bias), dout, dtype),
        gradients(eager, (x, bias), dout, dtype),
        gradients(eager, (x, bias), dout, torch.float64),
        name="out, dx, dbias",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_and_backward(backend, gradients, dtype, shape, approximate, with_bias):
    check(gradients, dtype, shape, approximate, with_bias)


drawn = given(
    shape=st.tuples(st.integers(0, 70), st.integers(1, 300)),
    approximate=st.sampled_from(["none", "tanh"]),
    with_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**30),
)


def check_drawn(shape, approximate, with_bias, dtype, seed):
    """All backends that take CPU tensors, on the same inputs."""
    for name in KERNELS:
        torch.manual_seed(seed)
        check(run_with_gradients, dtype, shape, approximate, with_bias, backend=name)


test_drawn_shapes = settings(deadline=None, max_examples=25)(drawn(check_drawn))
test_drawn_shapes_long = pytest.mark.full(
    settings(deadline=None, max_examples=150)(drawn(check_drawn))
)


def every_value(dtype):
    """All finite values of a 16-bit dtype; for fp32 a sweep of exponents and of [-12, 12]."""
    if dtype != torch.float32:
        bits = torch.arange(-(2**15), 2**15).to(torch.int16)
        values = bits.view(dtype)
        return values[values.isfinite()]
    exponents = 2.0 ** torch.arange(-60, 60)
    # Not torch.linspace: transformers' own, in its place once a model was loaded, knows no device.
    return torch.cat([torch.arange(-100_000, 100_001) * 12e-5, exponents, -exponents])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("derivative", [False, True])
def test_accuracy_over_the_whole_range(backend, dtype, approximate, derivative):
    """Every 16-bit value: within twice PyTorch's own largest error up to there (it makes its error
    by the size of x), or one ulp (eps) of the true result."""
    x = every_value(dtype)
    x = x[x.abs().argsort()]

    def run(function, x):
        x = x.detach().requires_grad_()
        out = function(x)
        return torch.autograd.grad(out.sum(), x)[0] if derivative else out.detach()

    def torchs(x):
        return torch.nn.functional.gelu(x, approximate=approximate)

    truth = run(torchs, x.double())
    ours = run(lambda x: ops.gelu(x[None], approximate=approximate)[0], x).double()
    # PyTorch computes 16-bit GELU in fp32 and rounds: so may we, and no worse.
    error = (run(torchs, x.float()).to(dtype).double() - truth).abs().cummax(0).values
    allowed = 2 * torch.maximum(error, torch.finfo(dtype).eps * truth.abs())
    assert truth.isfinite().all()
    bad = (ours - truth).abs() > allowed + torch.finfo(dtype).tiny
    assert not bad.any(), (x[bad][:3], ours[bad][:3], truth[bad][:3])


def spacing(x, dtype):
    """Between neighbours of a 16-bit dtype at float64 numbers."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** x.abs().clamp_min(info.tiny).log2().floor()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_result_is_one_of_the_two_next_to_the_true_one(backend, dtype):
    """The polynomials of the GPU's kernels err by less than one rounding, down to the smallest
    numbers of the type and on both sides of the gradient's root."""
    if backend in ("eager", "cpu"):
        pytest.skip("no polynomials for 16 bits")
    x = every_value(dtype)
    allowed = 1.0
    if backend == "triton" and dtype == torch.bfloat16 and not HAS_GPU:
        # Triton's interpreter cuts where a GPU rounds, and takes subnormal numbers for others.
        x, allowed = x[x.abs() >= torch.finfo(dtype).tiny], 1.5
    out = ops.gelu(x.requires_grad_()[None])[0]
    (dx,) = torch.autograd.grad(out.sum(), x)
    u = x.detach().double()
    tail = torch.special.log_ndtr(u).exp()  # ndtr itself ends at -8
    density = (-u * u / 2).exp() / math.sqrt(2 * math.pi)
    for found, truth in ((out, u * tail), (dx, tail + u * density)):
        error = (found.detach().double() - truth).abs() / spacing(truth, dtype)
        if allowed > 1:
            error[truth.abs() < torch.finfo(dtype).tiny] = 0
        worst = error.argmax()
        assert error[worst] < allowed, (x[worst], found[worst], truth[worst])
    edges = torch.tensor([[math.inf, math.nan]], dtype=dtype, requires_grad=True)
    out = ops.gelu(edges)
    (dx,) = torch.autograd.grad(out.sum(), edges)
    assert out[0, 0] == math.inf
    assert dx[0, 0] == 1
    assert out[0, 1].isnan()
    assert dx[0, 1].isnan()


def test_exact_tail_keeps_its_digits():
    """1 + erf(x) cancels for x << 0, all digits gone at -6; the kernel's tail must not."""
    x = torch.linspace(-7.7, -2, 1001)
    truth = x.double() * torch.special.erfc(x.double() / -math.sqrt(2)) / 2
    ours = ops.gelu(x[None], backend="cpu")[0].double()
    assert ((ours - truth) / truth).abs().max() < 2e-5


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_special_values(backend, approximate):
    x = torch.tensor([[math.nan, 0.0, -0.0, 1e30, -1e30]], requires_grad=True)
    out = ops.gelu(x, approximate=approximate)
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert out[0, 0].isnan()
    wanted = torch.tensor([0.0, 0.0, 1e30, 0.0])
    torch.testing.assert_close(out[0, 1:].detach(), wanted, rtol=0, atol=1e-12)
    if backend != "eager":
        assert dx[0, 0].isnan()
        wanted = torch.tensor([0.5, 0.5, 1.0, 0.0])
        torch.testing.assert_close(dx[0, 1:], wanted, rtol=0, atol=1e-6)
        edge = torch.tensor([[math.inf, 3e38, -3e38]])
        assert ops.gelu(edge, approximate=approximate)[0, :2].tolist() == edge[0, :2].tolist()
        assert ops.gelu(edge, approximate=approximate)[0, 2].abs() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bias_has_a_dtype_of_its_own(backend, dtype):
    """The same numbers in 16 bits, in float32 and off 16-byte addresses: the same bits."""
    if backend == "eager":
        pytest.skip("it casts it to x's dtype")
    x, dout = torch.randn(2, 9, 48).to(dtype)
    bias = torch.randn(49).to(dtype)[1:]

    def run(bias):
        bias = bias.detach().requires_grad_()
        out = ops.gelu(x, bias)
        return out.detach(), torch.autograd.grad(out, bias, dout)[0].to(dtype)

    found = [run(b) for b in (bias, bias.clone(), bias.float())]
    for out, dbias in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(dbias, found[0][1])


def test_out_may_be_the_input(backend):
    x, bias = torch.randn(9, 65), torch.randn(65)
    with torch.no_grad():
        fresh = ops.gelu(x, bias)
        assert ops.gelu(x, bias, out=x) is x
    torch.testing.assert_close(x, fresh)


def test_non_contiguous_and_misaligned(backend):
    x = torch.randn(40, 20).t()
    torch.testing.assert_close(ops.gelu(x), ops.gelu(x.contiguous()))
    shifted = torch.randn(401)[1:].view(20, 20)
    torch.testing.assert_close(ops.gelu(shifted), ops.gelu(shifted.clone()))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_an_elements_bits_do_not_depend_on_its_column(backend, approximate):
    """Whether it is one of many vectors that go together, one alone, or a row's end."""
    if backend != "cpu":
        pytest.skip("no other backend goes through a row by several vectors")
    x = torch.randn(4, 165)
    x[0, :6] = torch.tensor([0.0, -0.0, -9.0, 9.0, math.inf, math.nan])
    wanted = ops.gelu(x.view(-1, 1), approximate=approximate).view_as(x)
    torch.testing.assert_close(
        ops.gelu(x, approximate=approximate), wanted, rtol=0, atol=0, equal_nan=True
    )


def test_bitwise_repeatable_at_any_thread_count():
    x, bias = torch.randn(2000, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    dout = torch.randn(2000, 64)

    def run():
        out = ops.gelu(x, bias)
        return out, *torch.autograd.grad(out, (x, bias), dout)

    same_bits_at_any_thread_count(run)


BAD = [
    ({"x": torch.zeros(3, 8).bool()}, TypeError, "x must be floating point"),
    ({"x": torch.zeros(3, 0)}, ValueError, "x must be"),
    ({"bias": torch.zeros(7)}, ValueError, r"bias must have shape \(8,\)"),
    ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias is on meta"),
    ({"approximate": "erf"}, ValueError, "approximate must be"),
    ({"out": torch.zeros(3, 8).half()}, ValueError, "out must be"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        bert_fast.gelu(**({"x": torch.zeros(3, 8)} | change))
