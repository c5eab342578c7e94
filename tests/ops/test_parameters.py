"""Parameters as others' code leaves them in memory: parts of a larger tensor, or expanded."""

import pytest
import torch

from bert_fast import ops

WIDTH = 24
FORMS = {
    "every second": lambda vector: torch.stack([vector, vector + 9], -1)[..., 0],
    "from the second on": lambda vector: torch.cat([vector[..., :1] + 9, vector], -1)[..., 1:],
    "expanded": lambda vector: vector[..., :1].expand_as(vector),
}


def vector(*shape):
    return torch.randn(*shape, WIDTH)


def embedding(word, *rest):
    ids = torch.arange(7) % 5
    return ops.embedding_layer_norm(ids, ids, None, word, *rest)


OPS = {
    "layer_norm": (lambda x, *vectors: ops.layer_norm(x, *vectors[:2], linear_bias=vectors[2]),
                   [vector] * 3),
    "layer_norm, dropout": (
        lambda x, *vectors: ops.layer_norm(x, *vectors, residual=2 * x, dropout_p=0.3, seed=5),
        [vector] * 2),
    "gelu": (ops.gelu, [vector]),
    "linear_gelu": (ops.linear_gelu, [lambda: vector(8), lambda: torch.randn(8)]),
    "attention_qkv": (
        lambda x, bias: ops.attention_qkv(
            torch.stack([x, -x, x + 1], 1).view(7, 3, 3, 8), torch.tensor([0, 3, 7]).int(),
            bias=bias.view(3, 3, 8)),
        [lambda: torch.randn(3, 3, 8)]),
    "embedding_layer_norm": (
        lambda x, *rest: embedding(x, *rest), [lambda: vector(5), lambda: vector(2), vector, vector]
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", OPS)
def test_the_same_wherever_they_lie(backend, op, form):
    """As contiguous ones that hold the same; the gradients, too. What is read from another place is
    wrong by as much as it is; products of another layout add in another order."""
    run, makers = OPS[op]
    x, dout = torch.randn(7, WIDTH), None
    given = [FORMS[form](make()) for make in makers]
    found = []
    for vectors in (given, [v.clone(memory_format=torch.contiguous_format) for v in given]):
        leaves = [x.clone().requires_grad_(), *(v.detach().requires_grad_() for v in vectors)]
        out = run(*leaves)
        dout = torch.randn_like(out) if dout is None else dout
        found.append([out, *torch.autograd.grad(out, leaves, dout)])
    for ours, theirs in zip(*found, strict=True):
        most = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * most)
