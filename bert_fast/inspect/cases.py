"""What is inspected: the Triton backend's functions, each with tensors on the meta device."""

import functools
import itertools

import torch

from bert_fast import backends
from bert_fast.bench import works

meta = functools.partial(torch.empty, device="meta")


def kernels():
    return backends.import_module("triton")


def cases(full=False):
    """(name, work, a call of the backend's function on meta tensors): the main variants, or all."""
    # float16 compiles as bfloat16 does, but for the conversions.
    dtypes = [torch.bfloat16, torch.float32] if full else [torch.bfloat16]
    sizes = [(64, 512), (64, 128), (64, 64), (32, 128), (80, 512), (128, 512), (256, 512)]
    # Of models the products add their biases; where attention does, it takes more registers.
    variants = [(False, 0.0, False), (full, 0.1, False), (full, 0.1, True)]
    given = [
        (size, *variant, full) for size in (sizes if full else sizes[:2]) for variant in variants
    ]
    given += [(size, False, p, False, not full) for size in sizes[:2] for p in (0.0, 0.1)]
    if full:
        given += [(size, True, 0.1, False, False) for size in sizes]
    else:
        given.append((sizes[0], False, 0.0, True, False))  # a model's inference
    for dtype, ((head_dim, longest), causal, dropout_p, *biases), backward in itertools.product(
        dtypes, given, (False, True)
    ):
        yield attention(
            works.Attention(
                dtype, "meta", backward, lengths=(longest,) * 32, num_heads=12, head_dim=head_dim,
                causal=causal, dropout_p=dropout_p,
            ),
            *biases,
        )  # fmt: skip
    for dtype, width, dropout_p, backward in itertools.product(
        dtypes, (384, 768, 1024, 4096) if full else (768,), (0.0, 0.1), (False, True)
    ):
        work = works.LayerNorm(dtype, "meta", backward, rows=16384, width=width)
        if not (dropout_p or backward):
            yield layer_norm(work, training=False)
        yield layer_norm(work, dropout_p)
    for dtype, approximate, backward in itertools.product(
        dtypes, ("none", "tanh") if full else ("none",), (False, True)
    ):
        yield gelu(works.Gelu(dtype, "meta", backward, rows=16384, width=3072), approximate)
    for dtype, (width, out_width), approximate in itertools.product(
        dtypes, ((768, 3072), (1024, 4096)) if full else ((768, 3072),),
        ("none", "tanh") if full else ("none",),
    ):  # fmt: skip
        yield linear_gelu(
            works.LinearGelu(dtype, "meta", rows=16384, width=width, out_width=out_width),
            approximate,
        )
    for dtype in dtypes:
        work = works.LayerNorm(dtype, "meta", rows=16384, width=768)
        ids, tables = meta(16384, dtype=torch.int64), (meta(n, 768) for n in (30522, 512, 2))
        call = functools.partial(
            kernels().embedding_forward, ids, ids, ids, *tables, meta(768), meta(768), 1e-12, dtype,
            True,
        )  # fmt: skip
        yield str(work).replace("bias + residual", "embedding"), work, call


def attention(work, by_position=False, bias=False):
    """The case of one work, with a position bias of its longest sequence, with the projections'."""
    heads, longest, dtype = work.num_heads, work.max_seqlen, work.dtype
    q, k, v = meta(work.tokens, 3, heads, work.head_dim, dtype=dtype).unbind(1)
    seed = meta(1, dtype=torch.int64) if work.dropout_p else None
    options = (
        work.cu_seqlens, work.cu_seqlens, longest, longest,
        meta(3, heads, work.head_dim) if bias else None, work.head_dim**-0.5, work.causal,
        work.dropout_p, seed,
    )  # fmt: skip
    position = {"position_bias": meta(heads, longest, longest, dtype=dtype)} if by_position else {}
    if work.backward:
        dout, out = (meta(work.tokens, heads, work.head_dim, dtype=dtype) for _ in range(2))
        gradients = meta(work.tokens, 3, heads, work.head_dim, dtype=dtype).unbind(1)
        if by_position:
            position["dposition_bias"] = meta(heads, longest, longest)
        call = functools.partial(
            kernels().attention_backward, dout, q, k, v, out, meta(heads, work.tokens), *options,
            *gradients, **position,
        )  # fmt: skip
    else:
        call = functools.partial(kernels().attention_forward, q, k, v, *options, **position)
    return f"{work}{', position bias' * by_position}{', bias' * bias}", work, call


def layer_norm(work, dropout_p=0.0, training=True):
    """The case of one work; not ``training``: forward, which then saves nothing for backward."""
    x, other = (meta(work.rows, work.width, dtype=work.dtype) for _ in range(2))
    vector, statistics = meta(work.width), (meta(work.rows), meta(work.rows))
    dropout = dropout_p, meta(1, dtype=torch.int64) if dropout_p else None
    if work.backward:
        call = functools.partial(
            kernels().layer_norm_backward, x, other, *statistics, vector, True, *dropout
        )
    else:
        call = functools.partial(
            kernels().layer_norm_forward, x, vector, vector, other, vector, 1e-12, *dropout,
            training=training,
        )  # fmt: skip
    return f"{work}{', dropout' * (dropout_p > 0)}{', inference' * (not training)}", work, call


def gelu(work, approximate="none"):
    inputs = [meta(work.rows, work.width, dtype=work.dtype) for _ in range(1 + work.backward)]
    function = kernels().gelu_backward if work.backward else kernels().gelu_forward
    name = f"{work}{', tanh' * (approximate == 'tanh')}"
    return name, work, functools.partial(function, *inputs, meta(work.width), approximate)


def linear_gelu(work, approximate="none"):
    x = meta(work.rows, work.width, dtype=work.dtype)
    weight, vector = meta(work.out_width, work.width, dtype=work.dtype), meta(work.out_width)
    call = functools.partial(kernels().linear_gelu_forward, x, weight, vector, approximate, True)
    return f"{work}{', tanh' * (approximate == 'tanh')}", work, call
