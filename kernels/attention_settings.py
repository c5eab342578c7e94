"""Which tiles attention's kernels have, by chip, head size and length; and what BERT_FAST_AUTOTUNE
tries beside them."""

import functools

import torch

from bert_fast.kernels.common import capability, power_of_2

# The padded head_dim -> BLOCK_M, BLOCK_N, warps, stages; plain FMA (float32, and any dtype before
# 8.0) apart, then by chip: 90 and 100 have instructions of 64 rows, of which four warps have one,
# so eight warps on 64 rows would compute each twice; the others share mma.sync. What 90 has for
# heads of 64 was the fastest on an H100, in bfloat16, with dropout and without, 64 x 128 and
# 16 x 512; the rest is what spills no register, fits every chip's shared memory and takes few
# instructions (`bert-fast inspect`), not measured.
FORWARD = {
    "fma": {32: (64, 32, 8, 2), 64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 16, 1)},
    "mma": {32: (64, 64, 4, 3), 64: (64, 32, 4, 3), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
    90: {32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (128, 32, 8, 2), 256: (64, 32, 4, 1)},
    100: {32: (128, 64, 8, 3), 64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
}
BACKWARD_Q = {
    "fma": {32: (32, 32, 8, 1), 64: (32, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 16, 1)},
    "mma": {32: (64, 32, 4, 2), 64: (64, 32, 4, 2), 128: (64, 32, 8, 1), 256: (16, 32, 8, 1)},
    90: {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 32, 4, 1), 256: (32, 32, 8, 1)},
    100: {32: (64, 64, 4, 2), 64: (64, 64, 4, 1), 128: (64, 64, 8, 1), 256: (32, 32, 8, 1)},
}
# 90: two stages took a ninth less time without dropout, and spill two registers there.
BACKWARD_KV = BACKWARD_Q | {
    "fma": BACKWARD_Q["fma"] | {64: (32, 32, 8, 1)},
    90: BACKWARD_Q[90] | {32: (64, 64, 4, 1), 64: (64, 64, 4, 1)},
}


# On 9.0 with dropout beside a position bias, or beside a projection's, which take registers.
FORWARD_DROPOUT_BIASED = {64: (64, 64, 8, 2)}
BACKWARD_KV_DROPOUT_BIAS = {64: (128, 64, 8, 1)}


# Forward on tensor cores, head_dim <= 64, where no sequence is longer than this: one block of keys.
# (With dropout 128 keys take too many registers; on 90 two blocks of 64 were faster.)
SHORT = {"mma": {64: (64, 64, 4, 1), 128: (128, 128, 8, 1)}, 90: {64: (64, 64, 4, 1)}}
# Backward likewise, where no sequence has more queries or keys: one kernel (attention_short.py).
BACKWARD_SHORT = {
    "mma": {64: (64, 64, 4, 1), 128: (128, 32, 8, 1)},
    90: {64: (64, 64, 4, 1), 128: (128, 64, 8, 2)},
}


# With a position bias, which takes registers: in the same form, and found in the same way. (Causal,
# with dropout, in float32 and heads of 256, two registers spill in attention_table.py.)
FORWARD_BIASED = {
    "fma": {32: (32, 32, 8, 2), 64: (16, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 16, 1)},
    "mma": {32: (32, 64, 4, 3), 64: (32, 32, 4, 3), 128: (32, 32, 8, 2), 256: (16, 32, 8, 1)},
    90: {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 4, 1)},
    100: {32: (64, 64, 8, 3), 64: (64, 64, 8, 3), 128: (64, 32, 8, 2), 256: (64, 32, 8, 1)},
}
BACKWARD_BIASED = {
    "fma": {32: (32, 32, 8, 1), 64: (16, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 16, 1)},
    "mma": {32: (64, 32, 8, 1), 64: (32, 32, 4, 1), 128: (64, 32, 8, 1), 256: (16, 32, 8, 1)},
    90: {32: (64, 64, 4, 1), 64: (64, 32, 4, 1), 128: (64, 32, 8, 1), 256: (16, 32, 8, 1)},
    100: {32: (64, 64, 8, 1), 64: (64, 32, 8, 1), 128: (64, 32, 8, 1), 256: (16, 32, 8, 1)},
}
SHORT_BIASED = {"mma": {64: (64, 64, 4, 1)}}
# kernel -> its table without and with a position bias
TABLES = {
    "forward": (FORWARD, FORWARD_BIASED),
    "backward_q": (BACKWARD_Q, BACKWARD_BIASED),
    "backward_kv": (BACKWARD_KV, BACKWARD_BIASED),
    "backward_table": (BACKWARD_BIASED, BACKWARD_BIASED),
}


def settings(kernel, biased, head_dim, dtype, device, longest, dropout, bias):
    """BLOCK_D and the entry for it, of the tables above; ``longest``: the most keys of a sequence,
    or, for "backward_short", the most keys or queries, and None where that kernel is not meant;
    ``biased``: by position; ``bias``: the projections'."""
    return _settings(kernel, biased, head_dim, dtype, capability(device), longest, dropout, bias)


@functools.lru_cache(4096)
def _settings(kernel, biased, head_dim, dtype, chip, longest, dropout, bias):
    block_d = max(32, power_of_2(head_dim))
    fma = dtype == torch.float32 or chip < 80  # Triton has no tensor-core instruction for 7.5
    short = {"forward": SHORT_BIASED if biased else SHORT, "backward_short": BACKWARD_SHORT}
    if not fma and block_d <= 64 and kernel in short:
        for most, entry in short[kernel].get(chip, short[kernel]["mma"]).items():
            if longest <= most and not (kernel == "forward" and dropout and most > 64):
                return block_d, entry
    if kernel == "backward_short":
        return block_d, None
    if chip == 90 and not fma and dropout:
        heavy = {
            ("forward", True): FORWARD_DROPOUT_BIASED,
            ("backward_kv", False): BACKWARD_KV_DROPOUT_BIAS if bias else {},
        }
        if entry := heavy.get((kernel, biased), {}).get(block_d):
            return block_d, entry
    table = TABLES[kernel][biased]
    return block_d, table["fma" if fma else chip if chip in table else "mma"][block_d]


def registers(warps):
    """All that 16 warps can have: left alone, ptxas stops at half of them, and spills."""
    return 128 if warps == 16 else None


def candidates(q, longest, causal, bias, table, dropout_p, tiles):
    """What BERT_FAST_AUTOTUNE needs: what the fastest settings depend on (lengths by powers of
    two), and those it tries beside the table, for so many ``tiles`` of each block's rows."""
    block_d = max(32, power_of_2(q.shape[2]))
    longest = power_of_2(max(longest, 1))
    given = bias is not None, table is not None, dropout_p > 0
    kind = q.dtype, q.shape[1:], longest, causal, *given
    blocks = [(128, 128), (128, 64), (64, 128), (64, 64), (64, 32), (32, 32)]
    fitting = [pair for pair in blocks if sum(pair) * block_d * tiles <= 32768] or [(32, 32)]
    return kind, [(*p, warps, stages) for p in fitting for warps in (4, 8) for stages in (1, 2, 3)]
