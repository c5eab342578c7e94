"""GELU(x Wᵀ + bias) as one op: every backend against the float64 reference."""

import pytest
import torch
from conftest import DTYPES, assert_within

import bert_fast
from bert_fast import backends, ops
from bert_fast.backends import choice

# x's shape and out_width. In 16 bits the even ones go through descriptors where the chip has them.
SHAPES = [((1, 16), 8), ((7, 64), 136), ((131, 40), 264), ((65, 33), 77), ((0, 16), 8),
          ((2, 5, 24), 40), ((600, 16), 72)]  # fmt: skip


def drawn(shape, out_width, with_bias, dtype):
    x, dout = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-1], out_width).double()
    weight = torch.randn(out_width, shape[-1], dtype=torch.float64) / shape[-1] ** 0.5
    bias = torch.randn(out_width, dtype=torch.float64) if with_bias else None
    return [t if t is None else t.to(dtype).double() for t in (x, weight, bias, dout)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "out_width"), SHAPES, ids=str)
@pytest.mark.parametrize(("approximate", "with_bias"), [("none", True), ("tanh", False)])
def test_forward_and_backward(backend, gradients, dtype, shape, out_width, approximate, with_bias):
    x, weight, bias, dout = drawn(shape, out_width, with_bias, dtype)

    def run(x, weight, bias, backend=None):
        return ops.linear_gelu(x, weight, bias, approximate=approximate, backend=backend)

    def eager(x, weight, bias):
        return run(x, weight, bias, "eager")

    assert_within(
        gradients(run, (x, weight, bias), dout, dtype),
        gradients(eager, (x, weight, bias), dout, dtype),
        gradients(eager, (x, weight, bias), dout, torch.float64),
        name="out, dx, dweight, dbias",
    )


def test_inference_writes_where_it_is_told(backend):
    x, weight, bias, _ = (t.float() for t in drawn((33, 24), 40, True, torch.float32))
    wanted = ops.linear_gelu(x, weight, bias)
    out = torch.empty(33, 40)
    assert ops.linear_gelu(x, weight, bias, out=out) is not x
    assert torch.equal(out, wanted)
    weight = torch.cat([weight, weight], 1)[:, :24]  # rows with a stride of their own
    assert torch.equal(ops.linear_gelu(x, weight, bias), wanted)


def test_auto_uses_it_where_it_was_measured_to_win_alone(monkeypatch):
    """No chip has been measured: the table is empty, and says so by the platform's BLAS."""
    monkeypatch.setattr(choice, "why_not", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    asked = ("linear_gelu", "cuda", torch.bfloat16, False)
    assert backends.choose(*asked) == "eager"
    assert backends.choose(*asked, backend="triton") == "triton"
    assert backends.choose(*asked, backend="cpu") == "eager"  # that is, torch's product and gelu
    monkeypatch.setitem(backends.ONLY_WHERE_MEASURED, "linear_gelu", {(9, 0): "1.02x of cuBLAS"})
    assert backends.choose(*asked) == "triton"
    assert backends.choose("embedding_layer_norm", *asked[1:]) == "triton"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.randn(3, 5)}, r"weight must be \(out_width, 5\), not \(6, 4\)"),
        ({"weight": torch.randn(6, 4).bfloat16()}, "weight is torch.bfloat16, x is torch.float32"),
        ({"bias": torch.randn(4)}, r"bias must have shape \(6,\), not \(4,\)"),
        ({"approximate": "erf"}, "approximate must be 'none' or 'tanh', not 'erf'"),
        ({"out": torch.randn(3, 5)}, r"out must be \(3, 6\) torch.float32 on cpu"),
    ],
)
def test_bad_input(change, said):
    good = {"x": torch.randn(3, 4), "weight": torch.randn(6, 4), "bias": torch.randn(6)}
    with pytest.raises((TypeError, ValueError), match=said):
        bert_fast.linear_gelu(**(good | change))
