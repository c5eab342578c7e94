"""What a CTA of each kernel does in a turn of its main loop: its tile."""

import re

from bert_fast.inspect.counts import Tile

# Matrix products of a tile of scores, by kernel: S, and what is made of it.
ATTENTION = {
    "attention.forward": 2, "attention.backward_q": 3, "attention.backward_kv": 4,
    "attention_short.backward": 5, "attention_table.backward": 2,
}  # fmt: skip


def of_launch(kernel, constants, work):
    """A Triton kernel's tile, from the sizes that it is specialised for; None: not counted."""
    if products := ATTENTION.get(kernel):
        rows, cols = constants["BLOCK_M"], constants["BLOCK_N"]
        flops = 2 * products * rows * cols * constants["BLOCK_D"]
        return Tile(rows * cols, flops, products, exponentials=True)
    if kernel.startswith("linear."):
        rows, cols = constants["BLOCK_M"], constants["BLOCK_N"]
        return Tile(rows * cols, 2 * rows * cols * constants["BLOCK_K"], 1)
    if "ROWS" in constants and not kernel.startswith("common."):
        width = min(constants["BLOCK"], work.width)  # the rest of the block is masked
        return rows_of(constants["ROWS"] * width, work)
    return None


def rows_of(elements, work):
    return Tile(elements, bytes=elements * work.num_bytes / (work.rows * work.width))


# A CUDA kernel's name and its template arguments after the type.
CUDA = re.compile(r"(\w+)<(?:bf16|fp16), ([^>]*)>")


def _arguments(kernel):
    found = CUDA.match(kernel)
    return found[2].split(", ") if found else []


def warps_of_cuda(file, kernel):
    """Warps of a CTA of a CUDA kernel."""
    if file == "attention_mma_fused":
        return int(_arguments(kernel)[2])
    if file.startswith("attention_mma") or file == "gelu":
        return 4
    return 16 if kernel.endswith(" 512>") or file == "sums" else 8


def of_cuda(file, kernel):
    """A CUDA kernel's tile, and None where it is not counted: float32, sequences of one warp,
    layer-norm, whose width is known at the launch."""
    if not (arguments := _arguments(kernel)):
        return None
    name = kernel.partition("<")[0]
    biased = arguments[-1] not in ("true", "false")  # by position
    if file == "attention_mma":  # head_dim, keys, 16 rows a warp, threads of a team, dropout
        depth, cols, tall, team = map(int, arguments[:4])
        return _cuda_attention(64 * tall, cols, depth, 2) if team == 128 else None
    if file == "attention_mma_backward" and name in ("dq_kernel", "dkv_kernel"):
        depth, *given = arguments
        flags = [argument == "true" for argument in given if argument in ("true", "false")]
        wide = int(depth) > 64
        if name == "dq_kernel":
            cols, products = 32 if biased or wide else 64, 3
        else:  # dk is wanted, dv is wanted, dropout
            few, products = biased or flags[2], 1 + 2 * flags[0] + flags[1]
            cols = (16 if few else 32) if wide else (32 if few else 64)
        cols = min(cols, 16) if int(depth) > 128 else cols
        return _cuda_attention(64, cols, int(depth), products)
    if file == "attention_mma_fused":  # head_dim, queries, warps of 16 keys, dropout, long
        depth, cols = map(int, arguments[:2])
        rows = 16 * warps_of_cuda(file, kernel)
        return Tile(rows * cols, 2 * 5 * rows * cols * depth, 5)
    if file == "gelu" and name in ("forward", "backward"):  # numbers at once, which GELU
        rows, passes = (8, 2) if name == "forward" else (4, 3)
        elements = rows * int(arguments[0]) * 128
        return Tile(elements, bytes=passes * 2 * elements)
    return None


def _cuda_attention(rows, cols, depth, products):
    """Tiles of up to 32 columns go through the masked step, a loop of one turn."""
    return Tile(rows * cols, 2 * products * rows * cols * depth, products, nested=cols <= 32)
