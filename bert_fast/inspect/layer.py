"""A transformer layer's time at best, for a batch of sequences of any lengths."""

from dataclasses import dataclass

import torch

from bert_fast.bench import works
from bert_fast.inspect import cases
from bert_fast.inspect.chips import CHIPS
from bert_fast.inspect.kernels import compiled_cases


@dataclass(frozen=True)
class Step:
    """Of a layer: what it is, the least microseconds, and of these what is lost."""

    name: str
    kernel: str
    us: float
    ragged: float | None = None  # the share of the work that ragged ends of sequences lose
    idle: float | None = None  # the share of the time that passes while the last CTAs end


def layer(chip, lengths, hidden=768, heads=12, intermediate=3072, backward=False):
    """The :class:`Step`s of a post-norm layer (BERT's) in bfloat16 on packed tokens: inference, or
    ``backward``. Products are taken at the data sheet's peak, or the bandwidth of what they read
    and write; the others at what their compiled Triton kernels' counts allow."""
    rows, dtype = sum(lengths), torch.bfloat16
    attention = works.Attention(
        dtype, "meta", backward, lengths=tuple(lengths), num_heads=heads, head_dim=hidden // heads
    )
    norm = works.LayerNorm(dtype, "meta", backward, rows=rows, width=hidden)
    gelu = works.Gelu(dtype, "meta", backward, rows=rows, width=intermediate)
    given = [
        cases.attention(attention), cases.layer_norm(norm, training=backward), cases.gelu(gelu)
    ]  # fmt: skip
    found = {}
    for c in compiled_cases(given, [chip]):
        if c.best_us is not None:
            found.setdefault(c.kernel.split(".")[0].partition("_short")[0], []).append(c)

    def product(name, width, out_width):
        times = 2 if backward else 1  # the gradients of both factors
        flops = 2 * rows * width * out_width * times
        moved = 2 * times * (rows * width + rows * out_width + width * out_width)
        us = max(flops / CHIPS[chip].matmul, moved / CHIPS[chip].copy) / 1e6
        return [Step(name, "peak", us)]

    def ours(name, kind):
        return [Step(name, c.kernel, c.best_us, c.grid.ragged, c.grid.idle) for c in found[kind]]

    return [
        *product("q, k, v", hidden, 3 * hidden), *ours("attention", "attention"),
        *product("its output", hidden, hidden), *ours("layer-norm", "layer_norm"),
        *product("up", hidden, intermediate), *ours("gelu", "gelu"),
        *product("down", intermediate, hidden), *ours("layer-norm", "layer_norm"),
    ]  # fmt: skip
