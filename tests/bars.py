"""What the GPU kernels cost by their machine code, and must not rise above: one table.

Counted by `bert_fast.inspect` from what Triton 3.9 and nvcc 13.0 compile for 8.0 and 9.0: lane
instructions an element, that is a score of attention and a number of the others. ``bar`` and
``aim`` are what was asked for on 9.0, at head_dim 64, so that what falls short of them shows here.
"""

from typing import NamedTuple

from bert_fast.inspect.kernels import cuda_kernels_in

ALLOWED = 1.02  # of what is reached
LONG, SHORT = (f"attention, 32 x {n}, 12 heads of 64" for n in (512, 128))
NORM, GELU = "bias + residual + layer-norm, 16384 x 768", "bias + gelu, 16384 x 3072"
LINEAR, BACK = "linear + gelu, 16384 x 768 x 3072", "backward, bfloat16"


class Bar(NamedTuple):
    work: str
    kernels: tuple[str, ...]  # whose counts are added
    on_80: float | None  # reached
    on_90: float | None  # None: the same as in the work before
    bar: float | None = None
    aim: float | None = None


BOTH = "attention.backward_q", "attention.backward_kv"
# The loop of Triton's tutorial, which ours was to be level with, takes 11.0 and 8.12 in forward and
# 30.84 and 19.16 in backward, on 8.0 and 9.0 (docs/inspect.md).
TRITON = [
    Bar(f"{LONG}, bfloat16", ("attention.forward",), 13.94, 7.81, 8.8, 6.5),
    Bar(f"{LONG}, dropout 0.1, bfloat16", ("attention.forward",), 21.44, 16.09, 22, 16),
    Bar(f"{SHORT}, bfloat16", ("attention.forward",), 18.7, 9.19),
    Bar(f"{LONG}, {BACK}", BOTH, 30.5, 18.47, 20, 11),
    Bar(f"{LONG}, dropout 0.1, {BACK}", BOTH, 48.88, 31.09, 40, 28),
    Bar(f"{SHORT}, {BACK}", ("attention_short.backward",), 22.44, 17.56, 20, 11),
    Bar(f"{SHORT}, dropout 0.1, {BACK}", ("attention_short.backward",), 30.5, 25.12, 40, 28),
    Bar(f"{LONG}, bfloat16, position bias", ("attention.forward",), 16.78, 15.22),
    Bar(f"{LONG}, dropout 0.1, bfloat16, position bias", ("attention.forward",), 24.28, 23.31),
    Bar(f"{LONG}, {BACK}, position bias", BOTH, 50.5, 29.5),
    Bar(f"{LONG}, {BACK}, position bias", ("attention_table.backward",), 27.69, 27.75),
    Bar(f"{LONG}, dropout 0.1, {BACK}, position bias", BOTH, 72.44, 51.72),
    Bar(f"{LONG}, dropout 0.1, {BACK}, position bias", ("attention_table.backward",), 34.5, 31.94),
    # With the projections' biases, which the products of models add on a GPU.
    Bar(f"{LONG}, bfloat16, bias", ("attention.forward",), 13.81, 9.19),
    Bar(f"{LONG}, dropout 0.1, bfloat16, bias", ("attention.forward",), 21.69, 17.03),
    Bar(f"{SHORT}, bfloat16, bias", ("attention.forward",), 24.48, None),
    Bar(f"{LONG}, {BACK}, bias", BOTH, 42.44, 23.69),
    Bar(f"{LONG}, dropout 0.1, {BACK}, bias", BOTH, 61.5, 40.19),
    Bar(f"{SHORT}, {BACK}, bias", ("attention_short.backward",), 22.56, 17.53),
    Bar(f"{SHORT}, dropout 0.1, {BACK}, bias", ("attention_short.backward",), 30.56, 26.28),
    Bar(f"{NORM}, bfloat16, inference", ("layer_norm.forward",), 29.25, 29.67),
    Bar(f"{NORM}, bfloat16", ("layer_norm.forward",), 31.29, 32.38),
    Bar(f"{NORM}, bfloat16, dropout", ("layer_norm.forward",), 40.62, 41.38),
    Bar(f"{NORM}, {BACK}", ("layer_norm.backward",), 30.92, 31.83),
    Bar(f"{NORM}, {BACK}, dropout", ("layer_norm.backward",), 42.25, 42.17),
    Bar(f"{GELU}, bfloat16", ("gelu.forward",), 18.02, 18.12, 20, 16),
    Bar(f"{GELU}, {BACK}", ("gelu.backward",), 22.41, 22.38),
    Bar(f"{LINEAR}, bfloat16", ("linear.forward",), 1.39, 1.38),
    Bar("embedding + layer-norm, 16384 x 768, bfloat16", ("embedding.forward",), 57.67, 59.83),
]
INFERENCE_BYTES = 1.005  # of layer-norm, over the least: asked for 1.0, which leaves out parameters
BYTES_IN_FLIGHT = (
    16 * 1024
)  # at least, of an SM in layer-norm's backward: asked for; 40 KiB reached

# By the file and the kernel with its template arguments.
CUDA = [
    # 342 instructions for a warp's 16 x 64 elements; asked for 360, aim 285.
    Bar("attention_mma", ("forward_kernel<bf16, 64, 64, 2, 128, false>",), 10.83, 10.7, 11.25, 8.9),
    # Dropout costs 10.1 more; asked for half of 27.8.
    Bar("attention_mma", ("forward_kernel<bf16, 64, 64, 1, 128, true>",), 21.0, 20.82, 24.6),
    Bar("attention_mma_backward",
        ("dq_kernel<bf16, 64, false>", "dkv_kernel<bf16, 64, true, true, false>"),
        26.75, 27.31, 30, 20),
    Bar("attention_mma_backward",
        ("dq_kernel<bf16, 64, true>", "dkv_kernel<bf16, 64, true, true, true>"), 51.78, 51.65),
    # One kernel makes all three gradients: up to 128 keys, up to 64, and of more.
    Bar("attention_mma_fused", ("fused_kernel<bf16, 64, 32, 8, false, false>",),
        24.06, 24.12, 30, 20),
    Bar("attention_mma_fused", ("fused_kernel<bf16, 64, 32, 8, true, false>",), 37.38, 37.5),
    Bar("attention_mma_fused", ("fused_kernel<bf16, 64, 32, 4, false, false>",), 27.69, 27.69),
    Bar("attention_mma_fused", ("fused_kernel<bf16, 64, 32, 4, true, false>",), 40.62, 40.81),
    Bar("attention_mma_fused", ("fused_kernel<bf16, 32, 64, 8, false, false>",), 15.66, 15.78),
    Bar("attention_mma_fused", ("fused_kernel<bf16, 32, 64, 8, true, false>",), 27.78, 27.75),
    Bar("attention_mma_fused", ("fused_kernel<bf16, 64, 32, 8, false, true>",),
        26.25, 26.75, 30, 20),
    Bar("attention_mma_fused", ("fused_kernel<bf16, 64, 32, 8, true, true>",), 39.75, 40.94),
    Bar("attention_mma_fused", ("fused_kernel<bf16, 32, 64, 8, false, true>",), 16.91, 16.97),
    Bar("attention_mma_fused", ("fused_kernel<bf16, 32, 64, 8, true, true>",), 28.84, 29.09),
    Bar("gelu", ("forward<bf16, 8, erf>",), 17.25, 17.91, 20, 16),
    Bar("gelu", ("backward<bf16, 8, erf>",), 21.32, 22.38),
]  # fmt: skip


class Ceiling(NamedTuple):
    work: str
    kernels: tuple[str, ...]  # which run one after the other
    products: int  # that are useful: FlashAttention's count
    on_80: float  # TFLOP/s that the counts allow at most, reached
    on_90: float
    bars: tuple  # asked for, on 8.0 and 9.0
    aims: tuple


CEILINGS = [
    Ceiling(*CUDA[0][:2], 2, 311, 596, (220, 345), (290, 500)),
    Ceiling(*CUDA[2][:2], 5, 179, 272, (None, 320), (None, 420)),
    Ceiling(*CUDA[4][:2], 5, 248, 378, (None, 320), (None, 420)),
    Ceiling(*CUDA[10][:2], 5, 248, 378, (None, 320), (None, 420)),
]


def check_triton(rows):
    """Of all main variants, what `bert-fast inspect --chips 80 90 --json` wrote."""
    found = {(r["work"], r["kernel"], r["chip"]): r["counts"] for r in rows if r["counts"]}
    listed = set()
    for b in TRITON:
        for chip, most in ((80, b.on_80), (90, b.on_90)):
            if most is None:
                continue
            keys = [(b.work, kernel, chip) for kernel in b.kernels]
            cost = sum(found[key]["an_element"] for key in keys)
            assert cost <= most * ALLOWED, (chip, b.work, b.kernels, cost)
            listed.update(keys)
    assert set(found) == listed, "a variant that the table has not, or no longer has"
    for (work, kernel, chip), counts in found.items():
        # Else the loop that was counted is not the tile's.
        assert counts["executed"] >= counts["tile"]["flops"], (chip, work, kernel)
        assert counts["repeated"] <= 1 + 1e-6, (chip, work, kernel, counts["repeated"])
        if work == f"{NORM}, bfloat16, inference":
            assert counts["over_least"] <= INFERENCE_BYTES
        if kernel == "layer_norm.backward":
            assert counts["in_flight"] >= BYTES_IN_FLIGHT


def check_cuda(file, cubin, arch):
    """Of one file, compiled for "80" or "90a"."""
    at = ("80", "90a").index(arch)
    kernels = {c.work: c.counts for c in cuda_kernels_in(cubin, arch, "<bf16, ") if c.counts}
    assert all(counts.repeated == 1 for counts in kernels.values())
    for b in (b for b in CUDA if b.work == file):
        cost = sum(kernels[name].an_element for name in b.kernels)
        assert cost <= (b.on_80, b.on_90)[at] * ALLOWED, (arch, b.kernels, cost)
    for ceiling in (c for c in CEILINGS if c.work == file):
        counts = [kernels[name] for name in ceiling.kernels]
        (flops,) = {c.tile.flops / c.tile.products for c in counts}  # of a product of a tile
        useful = ceiling.products * flops / counts[0].tile.flops
        most = useful * counts[0].ceiling(sum(c.cycles_a_tile for c in counts))
        assert most >= (ceiling.on_80, ceiling.on_90)[at] / ALLOWED, (arch, most)
