"""What is inspected: the Triton backend's functions, each with tensors on the meta device."""

import functools
import itertools

import torch

from bert_fast import backends
from bert_fast.bench import works


def cases(full=False):
    """(name, work, a call of the backend's function on meta tensors): the main variants, or all."""
    kernels, meta = backends.import_module("triton"), functools.partial(torch.empty, device="meta")
    seed = meta(1, dtype=torch.int64)
    # float16 compiles as bfloat16 does.
    dtypes = [torch.bfloat16, torch.float32] if full else [torch.bfloat16]
    sizes = [(64, 512), (64, 128), (64, 64), (32, 128), (80, 512), (128, 512), (256, 512)]
    variants = [(False, 0.0, False), (full, 0.1, False), (False, 0.1, True)]
    for dtype, (head_dim, longest), (causal, dropout_p, biased), backward in itertools.product(
        dtypes, sizes if full else sizes[:2], variants, (False, True)
    ):
        work = works.Attention(
            dtype, "meta", backward, lengths=(longest,) * 32, num_heads=12, head_dim=head_dim,
            causal=causal, dropout_p=dropout_p,
        )  # fmt: skip
        tokens, heads = work.tokens, work.num_heads
        q, k, v = meta(tokens, 3, heads, head_dim, dtype=dtype).unbind(1)
        options = (work.cu_seqlens, work.cu_seqlens, longest, longest, meta(3, heads, head_dim),
                   head_dim**-0.5, causal, dropout_p, seed if dropout_p else None)  # fmt: skip
        position = {"position_bias": meta(heads, longest, longest, dtype=dtype)} if biased else {}
        if backward:
            dout, lse = torch.empty_like(q), meta(heads, tokens)
            if biased:
                position["dposition_bias"] = meta(heads, longest, longest)
            call = functools.partial(
                kernels.attention_backward, dout, q, k, v, dout, lse, *options, q, k, v, **position
            )
        else:
            call = functools.partial(kernels.attention_forward, q, k, v, *options, **position)
        yield f"{work}{', position bias' * biased}", work, call
    for dtype, width, dropout_p, backward in itertools.product(
        dtypes, (384, 768, 1024, 4096) if full else (768,), (0.0, 0.1), (False, True)
    ):
        work = works.LayerNorm(dtype, "meta", backward, rows=16384, width=width)
        name = f"{work}{', dropout' * (dropout_p > 0)}"
        x, other = (meta(16384, width, dtype=dtype) for _ in range(2))
        vector, statistics = meta(width), (meta(16384), meta(16384))
        some = seed if dropout_p else None
        if backward:
            call = functools.partial(
                kernels.layer_norm_backward, x, other, *statistics, vector, True, dropout_p, some
            )
        else:
            call = functools.partial(
                kernels.layer_norm_forward, x, vector, vector, other, vector, 1e-12, dropout_p, some
            )
            if not dropout_p:
                yield f"{name}, inference", work, functools.partial(call, training=False)
        yield name, work, call
    for dtype, approximate, backward in itertools.product(
        dtypes, ("none", "tanh") if full else ("none",), (False, True)
    ):
        work = works.Gelu(dtype, "meta", backward, rows=16384, width=3072)
        inputs = [meta(16384, 3072, dtype=dtype) for _ in range(1 + backward)]
        function = kernels.gelu_backward if backward else kernels.gelu_forward
        name = f"{work}{', tanh' * (approximate == 'tanh')}"
        yield name, work, functools.partial(function, *inputs, meta(3072), approximate)
    for dtype, (width, out_width), approximate, backward in itertools.product(
        dtypes, ((768, 3072), (1024, 4096)) if full else ((768, 3072),),
        ("none", "tanh") if full else ("none",), (False, True),
    ):  # fmt: skip
        work = works.LinearGelu(
            dtype, "meta", backward, rows=16384, width=width, out_width=out_width
        )
        x, y = meta(16384, width, dtype=dtype), meta(16384, out_width, dtype=dtype)
        weight, vector = meta(out_width, width, dtype=dtype), meta(out_width)
        name = f"{work}{', tanh' * (approximate == 'tanh')}"
        if backward:
            call = functools.partial(
                kernels.linear_gelu_backward, y, y, vector, weight, approximate
            )
        else:
            call = functools.partial(
                kernels.linear_gelu_forward, x, weight, vector, approximate, True
            )
        yield name, work, call
    for dtype in dtypes:
        work = works.LayerNorm(dtype, "meta", rows=16384, width=768)
        ids, tables = meta(16384, dtype=torch.int64), (meta(n, 768) for n in (30522, 512, 2))
        call = functools.partial(
            kernels.embedding_forward, ids, ids, ids, *tables, meta(768), meta(768), 1e-12, dtype,
            True,
        )  # fmt: skip
        yield str(work).replace("bias + residual", "embedding"), work, call
