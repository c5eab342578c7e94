"""``position_bias``, one table a head for all sequences: torch's own attention defines it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import cu_seqlens

from bert_fast import backends, ops

LENGTHS, KEYS, HEADS, WIDTH = [5, 0, 9, 1], [7, 3, 4, 0], 3, 8


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def torchs(q, k, v, table, lengths, keys, causal, scale):
    """One call of scaled_dot_product_attention a sequence; a sequence without keys gives zeros."""
    outs = []
    for one, others, values in zip(
        q.split(lengths), k.split(keys), v.split(keys), strict=True
    ):  # each (length, heads, width)
        rows, columns = len(one), len(others)
        mask = table[:, :rows, :columns]
        if causal:
            hidden = torch.ones(rows, columns).triu(1 + columns - rows).bool()
            mask = mask.masked_fill(hidden, -torch.inf)
        if rows and columns:
            heads_first = (t.transpose(0, 1) for t in (one, others, values))
            out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale)
            outs.append(out.transpose(0, 1))
        else:
            outs.append(one * 0)
    return torch.cat(outs)


@pytest.mark.parametrize("longer", [0, 4], ids=["just", "longer"])
@pytest.mark.parametrize("causal", [False, True])
def test_fused_projection(causal, longer):
    qkv, table = draw(sum(LENGTHS), 3, HEADS, WIDTH), draw(HEADS, 9 + longer, 9 + longer)
    dout = torch.randn(sum(LENGTHS), HEADS, WIDTH, dtype=torch.float64)
    ours = ops.attention_qkv(
        qkv, cu_seqlens(LENGTHS), position_bias=table, causal=causal, softmax_scale=0.3
    )
    theirs = torchs(*qkv.unbind(1), table, LENGTHS, LENGTHS, causal, 0.3)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(out, (qkv, table), dout) for out in (ours, theirs)]
    torch.testing.assert_close(*gradients)
    assert gradients[0][1].abs().sum() > 0
    assert not gradients[0][1][:, 9:].any()
    assert not gradients[0][1][:, :, 9:].any()


def test_keys_of_another_number():
    q, table = draw(sum(LENGTHS), HEADS, WIDTH), draw(HEADS, 9, 7)
    k, v = draw(sum(KEYS), HEADS, WIDTH), draw(sum(KEYS), HEADS, WIDTH)
    cu_q, cu_k = cu_seqlens(LENGTHS), cu_seqlens(KEYS)
    ours = ops.attention(q, k, v, cu_q, cu_k, position_bias=table)
    theirs = torchs(q, k, v, table, LENGTHS, KEYS, False, None)
    torch.testing.assert_close(ours, theirs)
    dout = torch.randn_like(ours)
    gradients = [torch.autograd.grad(out, (q, k, v, table), dout) for out in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_minus_infinity_hides_a_key_and_has_no_gradient():
    qkv, table = draw(6, 3, HEADS, WIDTH), draw(HEADS, 6, 6)
    hidden = torch.zeros(6, 6, dtype=torch.bool)
    hidden[2], hidden[:, 4] = True, True  # a query that sees nothing, a key that nobody sees
    masked = table.masked_fill(hidden, -torch.inf).detach().requires_grad_()
    out = ops.attention_qkv(qkv, cu_seqlens([6]), position_bias=masked)
    dqkv, dtable = torch.autograd.grad(out.square().sum(), (qkv, masked))
    assert not out[2].any()
    assert not dtable[:, hidden].any()
    assert not dqkv[4, 1:].any()
    assert torch.isfinite(dqkv).all()
    assert dtable[:, ~hidden].abs().sum() > 0


@pytest.mark.parametrize("lengths", [[0, 0], []], ids=str)
def test_no_tokens_leave_a_zero_gradient(lengths):
    qkv, table = draw(0, 3, HEADS, WIDTH), draw(HEADS, 2, 2)
    ops.attention_qkv(qkv, cu_seqlens(lengths), position_bias=table).sum().backward()
    assert torch.equal(table.grad, torch.zeros_like(table))


@pytest.mark.parametrize("shape", [(2, 9, 9), (HEADS, 8, 9), (HEADS, 9, 8), (9, 9)], ids=str)
def test_a_table_that_does_not_fit_is_refused(shape):
    qkv = draw(sum(LENGTHS), 3, HEADS, WIDTH)
    with pytest.raises(ValueError, match=r"position_bias must be \(3, at least 9, at least 9\)"):
        ops.attention_qkv(qkv, cu_seqlens(LENGTHS), position_bias=torch.zeros(shape).double())


def test_auto_takes_the_kernels():
    qkv, table, cu = torch.randn(9, 3, HEADS, WIDTH), torch.randn(HEADS, 9, 9), cu_seqlens([9])
    with backends.use_backend("auto"):
        auto = ops.attention_qkv(qkv, cu, position_bias=table)
        out = ops.attention_qkv(qkv, cu, position_bias=table, out=torch.empty_like(auto))
    cpu = ops.attention_qkv(qkv, cu, position_bias=table, backend="cpu")
    assert torch.equal(auto, cpu)
    assert torch.equal(out, cpu)
