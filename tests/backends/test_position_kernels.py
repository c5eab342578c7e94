"""``position_bias`` in the kernels: all that take one against the float64 reference, which
tests/ops/test_position_bias.py compares to torch's own attention."""

import pytest
import torch
from conftest import DTYPES, assert_within, cu_seqlens
from torch.library import opcheck

from bert_fast import ops

DROPPED = {"causal": True, "dropout_p": 0.25}
# lengths, num_heads, head_dim, options, by how much the table is too long: empty and length-1
# sequences; up to 32, up to 128 and more keys; more than a tile of rows and of columns
SHAPES = [
    ([1, 5], 2, 16, {}, 0),
    ([7, 0, 1, 65], 1, 64, DROPPED, 5),
    ([40, 33], 1, 64, {}, 2),
    ([131], 1, 32, {}, 0),
    ([66, 3], 1, 80, DROPPED, 0),
    ([17, 5], 1, 256, {"causal": True}, 3),
    ([3, 0, 32, 17, 1], 2, 20, {"dropout_p": 0.25}, 0),
]
SEED = 9_876_543_210_123


@pytest.fixture
def kernels(backend):
    if backend == "eager":
        pytest.skip("it is the definition")
    return backend


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "heads", "head_dim", "options", "longer"), SHAPES)
def test_forward_and_backward(kernels, gradients, lengths, heads, head_dim, dtype, options, longer):
    tokens, longest, cu = sum(lengths), max(lengths), cu_seqlens(lengths)
    qkv = draw(tokens, 3, heads, head_dim, dtype=dtype)
    bias = draw(3, heads, head_dim, dtype=dtype)
    table = draw(heads, longest + longer, longest + 2 * longer, dtype=dtype)
    dout = draw(tokens, heads, head_dim, dtype=dtype)

    def run(qkv, bias, table, backend=None):
        return ops.attention_qkv(
            qkv, cu, max_seqlen=longest, bias=bias, position_bias=table, seed=SEED,
            backend=backend, **options,
        )  # fmt: skip

    def eager(*inputs):
        return run(*inputs, "eager")

    inputs = qkv, bias, table
    ours = gradients(run, inputs, dout, dtype)
    theirs = (gradients(eager, inputs, dout, dt) for dt in (dtype, torch.float64))
    # The first rows of a causal sequence, which see few keys, err most: there dP and delta cancel.
    draws = heads * (3 * len(lengths) if options.get("causal") else tokens)
    assert_within(ours, *theirs, name="out, dqkv, dbias, dtable", draws=draws)
    assert not ours[3][:, longest:].any()
    assert not ours[3][:, :, longest:].any()


@pytest.mark.parametrize("causal", [False, True])
def test_keys_of_another_number(kernels, gradients, causal):
    lengths, keys = [5, 0, 66, 1, 20], [70, 3, 8, 0, 21]
    q, k, v = draw(sum(lengths), 1, 24), draw(sum(keys), 1, 24), draw(sum(keys), 1, 24)
    table = draw(1, 66, 70)

    def run(q, k, v, table, backend=None):
        cu = cu_seqlens(lengths), cu_seqlens(keys)
        return ops.attention(
            q, k, v, *cu, max_seqlen=66, max_seqlen_k=70, position_bias=table, causal=causal,
            backend=backend,
        )  # fmt: skip

    def eager(*inputs):
        return run(*inputs, "eager")

    inputs, dout = (q, k, v, table), draw(sum(lengths), 1, 24)
    assert_within(
        gradients(run, inputs, dout, torch.float32),
        gradients(eager, inputs, dout, torch.float32),
        gradients(eager, inputs, dout, torch.float64),
        name="out, dq, dk, dv, dtable",
    )


@pytest.mark.parametrize("scale", [-0.4, 0.0, 1e-35])
def test_a_scale_that_the_bias_cannot_be_divided_by(kernels, gradients, scale):
    lengths = [5, 0, 67]
    qkv, table, dout = draw(72, 3, 1, 16), draw(1, 67, 67), draw(72, 1, 16)

    def run(qkv, table, backend=None):
        return ops.attention_qkv(
            qkv, cu_seqlens(lengths), max_seqlen=67, position_bias=table, softmax_scale=scale,
            backend=backend,
        )  # fmt: skip

    def eager(*inputs):
        return run(*inputs, "eager")

    assert_within(
        gradients(run, (qkv, table), dout, torch.float32),
        gradients(eager, (qkv, table), dout, torch.float32),
        gradients(eager, (qkv, table), dout, torch.float64),
        name="out, dqkv, dtable",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_hides_a_key_and_has_no_gradient(kernels, gradients, dtype):
    """One query sees nothing, nobody sees one key."""
    lengths = [6, 40, 5]
    qkv, dout = draw(51, 3, 2, 16, dtype=dtype), draw(51, 2, 16, dtype=dtype)
    hidden = torch.zeros(40, 40, dtype=torch.bool)
    hidden[2], hidden[:, 4] = True, True
    table = draw(2, 40, 40, dtype=dtype).masked_fill(hidden, -torch.inf)

    def run(qkv, table, backend=None):
        return ops.attention_qkv(
            qkv, cu_seqlens(lengths), max_seqlen=40, position_bias=table, backend=backend
        )

    def eager(*inputs):
        return run(*inputs, "eager")

    found = gradients(run, (qkv, table), dout, dtype)
    theirs = (gradients(eager, (qkv, table), dout, dt) for dt in (dtype, torch.float64))
    assert_within(found, *theirs, name="out, dqkv, dtable")
    out, dqkv, dtable = found
    assert not out[[2, 8, 48]].any()
    assert not dtable[:, hidden].any()
    assert not dqkv[[4, 10, 50], 1:].any()
    _, lse = ops.attention_qkv(
        qkv.to(dtype), cu_seqlens(lengths), max_seqlen=40, position_bias=table.to(dtype),
        return_lse=True,
    )  # fmt: skip
    assert lse.isneginf().nonzero().tolist() == [[h, t] for h in (0, 1) for t in (2, 8, 48)]


def test_twice_the_same_bits(kernels, gradients):
    lengths = [17, 2, 9, 17, 1]
    inputs, dout = (draw(46, 3, 1, 32), draw(1, 17, 17)), draw(46, 1, 32)

    def run(qkv, table):
        return ops.attention_qkv(
            qkv, cu_seqlens(lengths), max_seqlen=17, position_bias=table, dropout_p=0.1, seed=SEED
        )

    for dtype in (torch.float32, torch.bfloat16):
        first, second = (gradients(run, inputs, dout, dtype) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_any_strides_and_a_dtype_of_its_own(kernels):
    """As an embedding of distances gives it: one number a head, last; in float32 beside 16 bits."""
    qkv = draw(40, 3, 4, 16).bfloat16().requires_grad_()
    table = draw(1, 30, 30, 4).float()
    strided = table.permute(0, 3, 1, 2)[0].requires_grad_()
    plain = strided.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    assert plain.is_contiguous()
    assert not strided.is_contiguous()
    results = []
    for one in (strided, plain):
        out = ops.attention_qkv(qkv, cu_seqlens([10, 30]), max_seqlen=30, position_bias=one)
        results.append((out, *torch.autograd.grad(out.sum(), (qkv, one))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][2].dtype == torch.float32
    assert results[0][2].abs().sum() > 0
    other = ops.attention_qkv(qkv, cu_seqlens([10, 30]), max_seqlen=30, position_bias=plain.flip(2))
    assert not torch.equal(results[0][0], other)


def test_a_frozen_table_changes_no_other_gradient(kernels):
    qkv, table = draw(20, 3, 2, 16).float().requires_grad_(), draw(2, 12, 12).float()
    grads = []
    for one in (table, table.clone().requires_grad_()):
        out = ops.attention_qkv(qkv, cu_seqlens([8, 12]), max_seqlen=12, position_bias=one)
        grads.append(torch.autograd.grad(out.square().sum(), qkv)[0])
    assert torch.equal(*grads)
    alone = table.clone().requires_grad_()
    out = ops.attention_qkv(qkv.detach(), cu_seqlens([8, 12]), max_seqlen=12, position_bias=alone)
    (found,) = torch.autograd.grad(out.square().sum(), alone)
    assert found.abs().sum() > 0


def test_out_and_a_padded_tail(kernels):
    qkv, table = draw(20, 3, 2, 16).float(), draw(2, 20, 20).float().requires_grad_()
    cu = cu_seqlens([4, 9])
    found = ops.attention_qkv(qkv, cu, position_bias=table, padded_tail=True)
    assert not found[13:].any()
    (dtable,) = torch.autograd.grad(found.square().sum(), table)
    alone = ops.attention_qkv(qkv[:13], cu, position_bias=table)
    assert torch.equal(*(t[:13] for t in (found, alone)))
    assert torch.equal(dtable, torch.autograd.grad(alone.square().sum(), table)[0])
    out = torch.full((13, 2, 16), torch.nan)
    with torch.no_grad():
        assert ops.attention_qkv(qkv[:13], cu, position_bias=table, out=out) is out
    assert torch.equal(out, alone)


@pytest.mark.parametrize("lengths", [[0, 0], []], ids=str)
def test_no_tokens_leave_a_zero_gradient(kernels, lengths):
    qkv, table = draw(0, 3, 2, 8).float(), draw(2, 3, 3).float().requires_grad_()
    ops.attention_qkv(qkv, cu_seqlens(lengths), position_bias=table).sum().backward()
    assert torch.equal(table.grad, torch.zeros_like(table))


@pytest.mark.parametrize("frozen", [False, True])
def test_opcheck(kernels, monkeypatch, frozen):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    qkv = torch.randn(7, 3, 1, 8)
    table, cu = torch.randn(1, 5, 5), cu_seqlens([2, 0, 5])
    options = (cu, cu, 5, 5, None, 0.3, True, 0.0, None, kernels)
    op = torch.ops.bert_fast
    fused = qkv.clone().requires_grad_()
    opcheck(op.attention_qkv.default, (fused, *options, table.clone().requires_grad_(not frozen)))
    out, lse = op.attention_qkv(qkv, *options, table)
    inputs = (torch.randn_like(out), qkv, out, lse, *options, table, not frozen)
    opcheck(op.attention_qkv_backward.default, inputs)
