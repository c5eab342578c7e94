"""Layer-norm with bias, dropout and residual: every backend against the float64 reference."""

import itertools
import math

import pytest
import torch
from conftest import (
    DTYPES,
    KERNELS,
    assert_within,
    run_with_gradients,
    same_bits_at_any_thread_count,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import bert_fast
from bert_fast import _C, ops

SHAPES = [(1, 768), (7, 384), (63, 1024), (127, 77), (513, 64), (3, 5), (0, 128), (2, 3, 30)]


def draw(*shape):
    vectors = torch.randn(3, shape[-1], dtype=torch.float64)
    x, residual, dout = torch.randn(3, *shape, dtype=torch.float64)
    return x, 1 + vectors[0] / 4, vectors[1], residual, vectors[2], dout


def check(gradients, dtype, with_residual, with_linear_bias, dropout_p, shape, backend=None):
    x, weight, bias, residual, linear_bias, dout = (t.to(dtype).double() for t in draw(*shape))
    inputs = (
        x, weight, bias, residual if with_residual else None,
        linear_bias if with_linear_bias else None,
    )  # fmt: skip

    def run(x, weight, bias, residual, linear_bias, backend=backend):
        return ops.layer_norm(
            x, weight, bias, residual=residual, linear_bias=linear_bias, dropout_p=dropout_p,
            seed=77, eps=1e-5, backend=backend,
        )  # fmt: skip

    def eager(*inputs):
        return run(*inputs, backend="eager")

    assert_within(
        gradients(run, inputs, dout, dtype),
        gradients(eager, inputs, dout, dtype),
        gradients(eager, inputs, dout, torch.float64),
        name="out, dx, dweight, dbias, dresidual, dlinear_bias",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_forward_and_backward(backend, gradients, dtype, shape, dropout_p):
    check(gradients, dtype, True, True, dropout_p, shape)


@pytest.mark.parametrize(
    "options", list(itertools.product([False, True], [False, True], [0.0, 0.4])), ids=str
)
def test_every_combination_of_options(backend, gradients, options):
    check(gradients, torch.float32, *options, shape=(19, 50))


def test_mixed_parameter_dtypes(backend):
    """bf16 activations with fp32 parameters, as under autocast."""
    x, weight, bias, residual, linear_bias, _ = draw(9, 40)
    low = x.bfloat16(), weight.float(), bias.float()
    out = ops.layer_norm(*low, residual=residual.bfloat16(), linear_bias=linear_bias.float())
    assert out.dtype == torch.bfloat16
    truth = ops.layer_norm(
        x, weight, bias, residual=residual, linear_bias=linear_bias, backend="eager"
    )
    assert (out.double() - truth).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [40, 37, 1048])
def test_each_parameter_has_a_dtype_of_its_own(backend, dtype, width):
    """The same numbers in 16 bits, in float32 and off 16-byte addresses: the same bits."""
    if backend == "eager":
        pytest.skip("it casts them to x's dtype")
    if backend == "triton" and width > 1000:
        pytest.skip("wide rows are no case of their own")
    x, weight, bias, residual, linear_bias, dout = (t.to(dtype) for t in draw(5, width))

    def run(*parameters):
        weight, bias, linear_bias = (p.detach().requires_grad_() for p in parameters)
        out = ops.layer_norm(x, weight, bias, residual=residual, linear_bias=linear_bias)
        grads = torch.autograd.grad(out, (weight, bias, linear_bias), dout)
        return [out.detach(), *(grad.to(dtype) for grad in grads)]

    def shifted(parameter):
        return torch.cat([parameter[:1], parameter])[1:]

    wanted = run(weight.float(), bias.float(), linear_bias.float())
    full, low = torch.Tensor.float, lambda parameter: parameter
    for casts in [
        (low, low, low),
        (full, low, shifted),
        (low, shifted, full),
        (shifted, full, low),
    ]:
        parameters = [c(p) for c, p in zip(casts, (weight, bias, linear_bias), strict=True)]
        for found, right in zip(run(*parameters), wanted, strict=True):
            if any(cast is shifted for cast in casts) and backend == "cuda":  # sums in other orders
                torch.testing.assert_close(found, right)
            else:
                assert torch.equal(found, right)


def test_out_may_be_an_input(backend):
    x, weight, bias, residual, linear_bias, _ = (t.float() for t in draw(33, 100))
    with torch.no_grad():
        options = {"linear_bias": linear_bias, "eps": 1e-12}
        fresh = ops.layer_norm(x, weight, bias, residual=residual, **options)
        poisoned = torch.full_like(x, math.nan)
        ops.layer_norm(x, weight, bias, residual=residual, out=poisoned, **options)
        torch.testing.assert_close(poisoned, fresh)
        over = residual.clone()
        ops.layer_norm(x, weight, bias, residual=over, out=over, **options)
        torch.testing.assert_close(over, fresh)


def test_non_contiguous_and_misaligned(backend):
    x = torch.randn(40, 20).t()
    weight, bias = torch.randn(2, 40)
    ours = ops.layer_norm(x, weight, bias)
    torch.testing.assert_close(ours, ops.layer_norm(x.contiguous(), weight, bias))
    storage = torch.randn(20 * 40 + 1)
    shifted = storage[1:].view(20, 40)
    torch.testing.assert_close(
        ops.layer_norm(shifted, weight, bias), ops.layer_norm(shifted.clone(), weight, bias)
    )


def test_rows_of_one_element(backend):
    """The gradient of x is zero but for rounding: a ratio of errors would say nothing."""
    x, weight, bias, _, _, dout = draw(5, 1)
    truth = ops.layer_norm(x, weight, bias, eps=1e-5, backend="eager")
    x = x.float().requires_grad_()
    out = ops.layer_norm(x, weight.float(), bias.float(), eps=1e-5)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    (dx,) = torch.autograd.grad(out, x, dout.float())
    assert dx.abs().max() < 1e-2


def test_constant_rows_are_not_nan(backend):
    out = ops.layer_norm(torch.full((4, 64), 3.0), torch.ones(64), torch.full((64,), 0.5))
    torch.testing.assert_close(out, torch.full((4, 64), 0.5))


def test_bitwise_repeatable_at_any_thread_count():
    x, weight, bias, residual, linear_bias, dout = (t.float() for t in draw(2000, 96))
    inputs = [t.requires_grad_() for t in (x, weight, bias, residual, linear_bias)]

    def run():
        out = ops.layer_norm(
            x, weight, bias, residual=residual, linear_bias=linear_bias, dropout_p=0.1, seed=3
        )
        return out, *torch.autograd.grad(out, inputs, dout)

    same_bits_at_any_thread_count(run)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
@pytest.mark.parametrize("width", [384, 77, 768])
def test_backward_of_rows_together_and_alone(isa, width):
    """By every instruction set's kernel: narrow rows go several at once, wide ones and the last of
    a chunk one by one. A NaN stays in its row and in the sums over rows."""
    x, weight, bias, residual, linear_bias, dout = draw(71, width)

    def run(dtype, backend, x=x):
        inputs = [t.to(dtype).requires_grad_() for t in (x, weight, bias, residual, linear_bias)]
        x, weight_, bias_, *more = inputs
        options = {"residual": more[0], "linear_bias": more[1], "dropout_p": 0.2, "seed": 5}
        out = ops.layer_norm(x, weight_, bias_, backend=backend, **options)
        return torch.autograd.grad(out, inputs, dout.to(dtype))

    best = _C.cpu_isa()
    try:
        _C.set_cpu_isa(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    try:
        ours, poisoned = run(torch.float32, "cpu"), x.clone()
        poisoned[2, 3] = math.nan
        dx, dweight, *_ = run(torch.float32, "cpu", poisoned)
    finally:
        _C.set_cpu_isa(best)
    assert_within(ours, run(torch.float32, "eager"), run(torch.float64, "eager"))
    others = torch.arange(71) != 2
    assert torch.equal(dx[others], ours[0][others])
    assert dx[2].isnan().all()
    assert dweight.isnan().all()


drawn = given(
    shape=st.tuples(st.integers(0, 70), st.integers(4, 300)),
    options=st.tuples(st.booleans(), st.booleans(), st.sampled_from([0.0, 0.2])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**30),
)


def check_drawn(shape, options, dtype, seed):
    """All backends that take CPU tensors, on the same inputs."""
    for name in KERNELS:
        torch.manual_seed(seed)
        check(run_with_gradients, dtype, *options, shape, backend=name)


test_drawn_shapes = settings(deadline=None, max_examples=25)(drawn(check_drawn))
test_drawn_shapes_long = pytest.mark.full(
    settings(deadline=None, max_examples=150)(drawn(check_drawn))
)


BAD = [
    ({"x": torch.zeros(3, 8).int()}, TypeError, "x must be floating point"),
    ({"x": torch.zeros(())}, ValueError, "x must be"),
    ({"weight": torch.zeros(7)}, ValueError, r"weight must have shape \(8,\)"),
    ({"bias": torch.zeros(8, 1)}, ValueError, r"bias must have shape \(8,\)"),
    ({"linear_bias": torch.zeros(9)}, ValueError, r"linear_bias must have shape \(8,\)"),
    ({"residual": torch.zeros(4, 8)}, ValueError, "residual must have x's shape"),
    ({"residual": torch.zeros(3, 8).half()}, TypeError, "residual is torch.float16"),
    ({"residual": torch.zeros(3, 8, device="meta")}, ValueError, "residual is on meta"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must be in"),
    ({"out": torch.zeros(3, 9)}, ValueError, "out must be"),
    ({"out": torch.zeros(8, 3).t()}, ValueError, "out must be contiguous"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input(change, error, message):
    good = {"x": torch.zeros(3, 8), "weight": torch.ones(8), "bias": torch.zeros(8)}
    with pytest.raises(error, match=message):
        bert_fast.layer_norm(**(good | change))
