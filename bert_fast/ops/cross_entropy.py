"""Cross-entropy over a vocabulary, without ever holding all its logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a label that counts for nothing
BLOCK = 512  # rows at a time; of BERT's vocabulary 62 MB of fp32 logits


@torch.library.custom_op("bert_fast::linear_cross_entropy", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ignore: bool, training: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, how many are right, and where ``training`` the gradients.

    d loss / d logits = (softmax - one_hot(label)) / count, as in any softmax regression. It is
    taken here, while a block's logits are there, so no logits are kept for backward.
    """
    whole = x
    if ignore:
        rows = (labels != IGNORED).nonzero().squeeze(1)
        x, labels = x.index_select(0, rows), labels.index_select(0, rows)
    loss = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
    correct = torch.zeros((), dtype=torch.int64, device=x.device)
    dx, dweight, dbias = _gradients(x, weight, bias, training)
    dweight, dbias = dweight.to(loss.dtype).zero_(), dbias.to(loss.dtype).zero_()
    for first in range(0, len(x), BLOCK):
        some = slice(first, first + BLOCK)
        logits = F.linear(x[some], weight).to(loss.dtype) + bias
        logits -= logits.amax(1, keepdim=True)  # so that nothing large cancels below
        lse = logits.logsumexp(1, keepdim=True)
        column = labels[some, None]
        loss += (lse - logits.gather(1, column)).sum()
        correct += (logits.argmax(1) == labels[some]).sum()
        if not training:
            continue
        slope = logits.sub_(lse).exp_()
        slope.scatter_add_(1, column, slope.new_full((), -1.0).expand(column.shape))
        slope /= len(x)
        dbias += slope.sum(0)
        slope = slope.to(x.dtype)
        torch.mm(slope, weight, out=dx[some])
        if dweight.dtype == x.dtype:
            dweight.addmm_(slope.t(), x[some])
        else:
            dweight += slope.t() @ x[some]
    if training and ignore:
        dx = torch.zeros_like(whole).index_copy_(0, rows, dx)
    loss /= max(len(x), 1)
    return loss, correct, dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _gradients(x, weight, bias, training):
    """Of x, weight and bias, uninitialised; empty where none are wanted."""
    return tuple(t.new_empty(t.shape if training else (0,)) for t in (x, weight, bias))


@_forward.register_fake
def _(x, weight, bias, labels, ignore, training):
    loss = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    correct = x.new_empty((), dtype=torch.int64)
    return loss, correct, *_gradients(x, weight, bias, training)


@torch.library.custom_op("bert_fast::linear_cross_entropy_backward", mutates_args=())
def _backward(
    dloss: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor,
    x: Tensor, weight: Tensor, bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The last three are what a second derivative would be by: asked for, it is refused."""
    scaled = (gradient * dloss.to(gradient.dtype) for gradient in (dx, dweight, dbias))
    dx, dweight, dbias = scaled
    return dx, dweight, dbias


@_backward.register_fake
def _(dloss, dx, dweight, dbias, *_):
    return tuple(map(torch.empty_like, (dx, dweight, dbias)))


def _save(ctx, inputs, output):
    _, correct, *gradients = output
    ctx.mark_non_differentiable(correct, *gradients)
    ctx.save_for_backward(*gradients, *inputs[:3])


def _no_second_order(ctx, *_):
    raise NotImplementedError("linear_cross_entropy has no second derivative")


_forward.register_autograd(
    lambda ctx, dloss, *_: (*_backward(dloss, *ctx.saved_tensors), None, None, None),
    setup_context=_save,
)
_backward.register_autograd(_no_second_order)


def linear_cross_entropy(x, weight, bias, labels, *, ignore=False):
    """Mean over rows of -log softmax(x Wᵀ + bias)[label].

    Args:
        x: (rows, hidden). weight: (vocab, hidden). bias: (vocab,).
        labels: int64 (rows,), in [0, vocab).
        ignore: rows whose label is -100 count for nothing, and are not computed.

    Returns:
        The loss, at least fp32 (0 where there are no rows), and in how many rows the label has the
        highest score.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, weight = (t.to(torch.get_autocast_dtype(device)) for t in (x, weight))
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    with torch.autocast(device, enabled=False):
        return _forward(x, weight, bias, labels, ignore, training)[:2]
