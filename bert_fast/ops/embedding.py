"""BERT's embeddings: three tables gathered, added and normalised."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast import backends
from bert_fast.backends import BackendName
from bert_fast.ops.checks import (
    check,
    check_same_dtype,
    check_tensors,
    check_vector,
    is_concrete,
    shape_of,
)
from bert_fast.ops.layer_norm import layer_norm
from bert_fast.ops.library import (
    call,
    call_backward,
    define,
    fake,
    needs_grad_of,
    register_autocast,
    register_autograd,
)
from bert_fast.ops.tokens import range_of

_IDS = "input_ids", "position_ids", "token_type_ids"


def embedding_layer_norm(
    input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None, word: Tensor,
    position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-12,
    padding_idx: int | None = None, backend: BackendName | None = None,
) -> Tensor:  # fmt: skip
    """LN(word[input_ids] + position[position_ids] + token_type[token_type_ids]) · weight + bias.

    Args:
        input_ids, position_ids, token_type_ids: packed, (total_tokens,), int32 or int64;
            token_type_ids None means all 0.
        word, position, token_type: embedding tables, (number, hidden).
        weight, bias, eps: layer-norm's, as in :func:`layer_norm`.
        padding_idx: the row of ``word`` that gets no gradient.

    Returns:
        (total_tokens, hidden); under autocast in its dtype, else in the tables'.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        IndexError: an id is outside of its table (on a GPU: an assertion there).
        BackendUnavailableError: the backend asked for cannot run this.
    """
    check_tensors(
        ("word", word), position=position, token_type=token_type, weight=weight, bias=bias
    )
    check_same_dtype(("word", word), position=position, token_type=token_type)
    tables = word, position, token_type
    for name, table in zip(("word", "position", "token_type"), tables, strict=True):
        if not (table.ndim == 2 and table.shape[1] == word.shape[1] >= 1):
            raise ValueError(f"{name} must be (number, {word.shape[-1]}), not {shape_of(table)}")
    ids = input_ids, position_ids, token_type_ids
    for name, tensor in zip(_IDS, ids, strict=True):
        if tensor is not None or name != "token_type_ids":
            _check_packed_ids(name, tensor, input_ids, word.device)
    check_vector("weight", weight, word.shape[1])
    check_vector("bias", bias, word.shape[1])
    eps = float(eps)
    needs_grad = needs_grad_of(word, position, token_type, weight, bias)
    device, width = word.device, word.shape[1]
    name = backends.choose("embedding_layer_norm", device, word.dtype, needs_grad, backend, width)
    if name != "eager":
        if name != "cpu":  # whose kernel looks, and refuses
            _check_in_tables(ids, tables)
        on = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if on else word.dtype
        return call(
            "embedding_layer_norm", needs_grad, input_ids, position_ids, token_type_ids, word,
            position, token_type, weight, bias, eps, -1 if padding_idx is None else padding_idx,
            dtype, needs_grad, name,
        )[0]  # fmt: skip
    rest, first = F.embedding(position_ids, position), None
    if token_type_ids is None:
        first = token_type[0]
    else:
        rest = rest + F.embedding(token_type_ids, token_type)
    return layer_norm(
        F.embedding(input_ids, word, padding_idx), weight, bias, residual=rest, linear_bias=first,
        eps=eps, backend=backend,
    )  # fmt: skip


def _check_packed_ids(name, ids, like, device):
    if not (isinstance(ids, Tensor) and ids.dtype in (torch.int32, torch.int64)):
        raise TypeError(f"{name} must be an int64 or int32 tensor")
    check(
        ids.ndim == 1 and ids.shape == like.shape,
        lambda: f"{name} must be packed, (total_tokens,), and like input_ids, not {shape_of(ids)}",
    )
    check(ids.device == device, lambda: f"{name} is on {ids.device}, word on {device}")


def _check_in_tables(ids, tables):
    """What torch's embedding checks, where the values can be seen; on a device the kernel does."""
    for name, tensor, table in zip(_IDS, ids, tables, strict=True):
        if tensor is not None and is_concrete(tensor) and tensor.numel():
            low, high = range_of(tensor)
            check(
                low >= 0 and high < len(table),
                f"{name} out of range: {low} to {high}, the table has 0 to {len(table) - 1}",
                IndexError,
            )


@define(
    "embedding_layer_norm(Tensor input_ids, Tensor position_ids, Tensor? token_type_ids, "
    "Tensor word, Tensor position, Tensor token_type, Tensor weight, Tensor bias, float eps, "
    "int padding_idx, ScalarType dtype, bool training, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    absent=(None,) * 4,
)
def _embedding_layer_norm(input_ids, position_ids, token_type_ids, *rest):
    *tables, weight, bias, eps, _, dtype, training, backend = rest
    ids = [_contiguous(i) for i in (input_ids, position_ids, token_type_ids)]
    found = backends.module(backend).embedding_forward(
        *ids, *map(_contiguous, tables), weight, bias, eps, dtype, training
    )
    if found is None:
        _check_in_tables(ids, tables)
        raise IndexError("token_type has no rows")
    return found


def _contiguous(tensor):
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


@fake("embedding_layer_norm")
def _(input_ids, position_ids, token_type_ids, word, *rest):
    *_, dtype, training, _ = rest
    rows, width = input_ids.numel(), word.shape[1]
    out = word.new_empty((rows, width), dtype=dtype)
    if not training:
        return out, *(word.new_empty(0) for _ in range(3))
    return out, torch.empty_like(out), *(word.new_empty(rows, dtype=torch.float32) for _ in "12")


def _save_embedding_layer_norm(ctx, inputs, output):
    *ids, word, position, token_type, weight, bias, _, ctx.padding_idx, _, _, ctx.backend = inputs
    _, total, mean, rstd = output
    ctx.mark_non_differentiable(total, mean, rstd)
    ctx.save_for_backward(*ids, total, mean, rstd, weight)
    ctx.tables = [(t.shape[0], t.dtype) for t in (word, position, token_type)]
    ctx.bias_dtype = bias.dtype


def _to_sort(ids):
    """Ids as torch's embedding sorts them, on a GPU those of more than 3,072 tokens: eight bits a
    pass, so int32 takes half the passes of int64, for the same order."""
    count = ids.numel()
    known = type(count) is int  # not a symbol of a traced shape
    return ids.int() if ids.is_cuda and known and count > 3072 else ids


def _embedding_layer_norm_autograd(ctx, dout, *_):
    *ids, total, mean, rstd, weight = ctx.saved_tensors
    # Where every token has type 0, that row is what a linear layer's bias would be.
    of_type_0 = ids[2] is None
    _, dsum, dweight, dbias, dfirst = call_backward(
        "layer_norm_backward", dout, total, mean, rstd, weight, of_type_0, 0.0, None, ctx.backend
    )

    def gradient(ids, padding, count, dtype):
        if ids is None:
            dtable = dfirst.new_zeros(count, len(dfirst), dtype=dtype)
            dtable[0] = dfirst
            return dtable
        return torch.ops.aten.embedding_dense_backward(
            dsum.to(dtype), _to_sort(ids), count, padding, False
        )

    paddings, needed = (ctx.padding_idx, -1, -1), ctx.needs_input_grad[3:6]
    dtables = [
        gradient(i, padding, *table) if need else None
        for i, padding, table, need in zip(ids, paddings, ctx.tables, needed, strict=True)
    ]
    return *[None] * 3, *dtables, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), *[None] * 5


register_autograd(
    "embedding_layer_norm", _embedding_layer_norm_autograd, _save_embedding_layer_norm
)
register_autocast("embedding_layer_norm", 0)
