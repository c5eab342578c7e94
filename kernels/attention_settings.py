"""Which tiles attention's kernels have, by chip, head size and length; and what BERT_FAST_AUTOTUNE
tries beside them."""

import functools

import torch
import triton

from bert_fast.kernels.common import capability, power_of_2

# The padded head_dim -> BLOCK_M, BLOCK_N, warps, stages; plain FMA (float32, and any dtype before
# 8.0) apart, then by chip: 90 and 100 have instructions of 64 rows, of which four warps have one,
# so eight warps on 64 rows would compute each twice; the others share mma.sync. What 90 has for
# heads of 64 was the fastest on an H100 without dropout, in bfloat16, 64 x 128 and 16 x 512, of
# what spills nothing; with dropout an H200 took a twelfth less in forward for 64 x 128 with (64,
# 32, 4, 3), and a twentieth more for 16 x 512. But for its forward of more than 128 keys: 128 rows
# take a sixth fewer instructions a score than 64, for as many rows an SM, and with two stages took
# 3 to 4% less time; with three, as here, only 64 were measured. The rest is what spills no
# register, fits every chip's shared memory and takes few instructions (`bert-fast inspect`), not
# measured.
FORWARD = {
    "fma": {32: (64, 32, 8, 2), 64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 16, 1)},
    "mma": {32: (64, 64, 4, 3), 64: (64, 32, 4, 3), 128: (64, 32, 4, 2), 256: (32, 32, 4, 1)},
    90: {32: (64, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 32, 8, 2), 256: (32, 32, 4, 1)},
    100: {32: (128, 64, 8, 3), 64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
}
BACKWARD_Q = {
    "fma": {32: (64, 16, 8, 1), 64: (32, 16, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 16, 1)},
    "mma": {32: (64, 32, 4, 2), 64: (64, 32, 4, 2), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1)},
    90: {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1)},
    100: {32: (64, 64, 4, 2), 64: (64, 64, 4, 1), 128: (64, 64, 8, 1), 256: (32, 32, 4, 1)},
}
# 90: two stages took a ninth less time without dropout, a 28th less of all backward with it, and
# spill registers.
BACKWARD_KV = BACKWARD_Q | {
    "fma": BACKWARD_Q["fma"] | {32: (32, 32, 4, 1), 64: (32, 32, 8, 1)},
    "mma": {32: (64, 64, 4, 1), 64: (64, 32, 4, 2), 128: (32, 64, 8, 1), 256: (16, 32, 4, 1)},
    90: {32: (64, 64, 4, 1), 64: (64, 64, 4, 1), 128: (64, 32, 4, 1), 256: (16, 32, 4, 1)},
    100: BACKWARD_Q[100] | {256: (16, 32, 4, 1)},
}


# Forward on tensor cores, head_dim <= 64, where no sequence is longer than this: one block of keys.
# (With dropout 128 keys take too many registers; on 90 two blocks of 64 were faster.)
SHORT = {
    "mma": {64: (64, 64, 4, 1), 128: (128, 128, 8, 1)},
    90: {64: (64, 64, 4, 1), 128: (64, 64, 4, 3)},
}
# Backward likewise, where no sequence has more queries or keys: one kernel (attention_short.py).
BACKWARD_SHORT = {
    "mma": {64: (64, 32, 4, 1), 128: (128, 32, 8, 1)},
    90: {64: (64, 64, 4, 1), 128: (128, 64, 8, 2)},
    100: {64: (64, 32, 4, 1), 128: (128, 32, 8, 2)},
}
BACKWARD_SHORT[120] = BACKWARD_SHORT[100]


# With a position bias, which takes registers: in the same form, and found in the same way. (Warps
# are split by rows, 16 for each: those that are more repeat the products of others.)
FORWARD_BIASED = {
    "fma": {32: (64, 16, 4, 1), 64: (16, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 16, 1)},
    "mma": {32: (64, 32, 4, 3), 64: (64, 64, 4, 2), 128: (128, 32, 8, 1), 256: (32, 32, 4, 1)},
    90: {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (128, 32, 8, 1), 256: (32, 32, 4, 1)},
    100: {32: (64, 64, 8, 3), 64: (64, 64, 4, 2), 128: (64, 32, 8, 2), 256: (64, 32, 8, 1)},
}
BACKWARD_Q_BIASED = {
    "fma": {32: (32, 32, 8, 1), 64: (16, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 16, 1)},
    "mma": {32: (64, 32, 4, 1), 64: (32, 64, 4, 1), 128: (32, 64, 8, 1), 256: (32, 32, 4, 1)},
    90: {32: (64, 64, 4, 1), 64: (64, 64, 4, 1), 128: (64, 32, 4, 1), 256: (16, 64, 8, 1)},
    100: {32: (64, 64, 8, 1), 64: (64, 32, 8, 1), 128: (64, 64, 8, 1), 256: (16, 64, 8, 1)},
}
BACKWARD_Q_BIASED[120] = BACKWARD_Q_BIASED["mma"] | {256: (16, 64, 8, 1)}
BACKWARD_KV_BIASED = {
    "fma": BACKWARD_Q_BIASED["fma"] | {32: (32, 32, 4, 1)},
    "mma": {32: (32, 32, 2, 1), 64: (32, 32, 4, 1), 128: (32, 64, 8, 1), 256: (16, 32, 4, 1)},
    90: {32: (32, 32, 2, 1), 64: (64, 64, 4, 1), 128: (32, 64, 8, 1), 256: (16, 32, 4, 1)},
    100: {32: (64, 64, 8, 1), 64: (64, 32, 8, 1), 128: (32, 64, 8, 1), 256: (16, 32, 4, 1)},
}
BACKWARD_TABLE = {
    "fma": BACKWARD_Q_BIASED["fma"],
    "mma": {32: (64, 32, 4, 1), 64: (64, 32, 4, 1), 128: (32, 64, 8, 1), 256: (16, 64, 8, 1)},
    90: {32: (64, 64, 8, 1), 64: (64, 32, 4, 1), 128: (64, 32, 8, 1), 256: (16, 64, 8, 1)},
    100: {32: (64, 64, 8, 1), 64: (64, 32, 8, 1), 128: (64, 32, 8, 1), 256: (16, 64, 8, 1)},
}
if hasattr(triton, "knobs"):  # before 3.4 a product has 16 rows at least
    BACKWARD_TABLE[75] = BACKWARD_TABLE["fma"] | {128: (8, 16, 4, 1)}
SHORT_BIASED = {"mma": {64: (64, 64, 4, 1)}}
# What differs, and where: dropout takes registers beside either bias, and a causal mask more of
# them. (Heads of 256 leave few for tiles of 64 rows, which 100's product instructions need.) The
# last that fits counts.
PLAIN, BIASED = {"biased": False}, {"biased": True}
EXCEPTIONS = [
    ("forward", PLAIN | {"dropout": True}, {90: {64: (64, 64, 4, 3)}}),
    ("forward", PLAIN | {"bias": True}, {90: {64: (64, 64, 4, 3)}}),
    ("forward", BIASED | {"dropout": True},
     {"mma": {128: (64, 32, 4, 1)}, 100: {32: (64, 32, 8, 2), 256: (32, 32, 4, 1)}}),
    ("forward", BIASED | {"bias": True}, {"mma": {128: (32, 32, 4, 2)}}),
    # An H200 took 188 us for a backward on 16 x 512 with this, 198 with two stages.
    ("backward_q", PLAIN | {"dropout": True}, {90: {64: (64, 64, 4, 3)}}),
    ("backward_kv", BIASED | {"dropout": True}, {90: {64: (64, 32, 4, 1)}}),
    ("backward_kv", PLAIN | {"bias": True}, {90: {128: (32, 64, 8, 1)}}),
    ("backward_kv", PLAIN | {"bias": True, "dropout": True}, {90: {64: (128, 64, 8, 1)}}),
    ("backward_kv", PLAIN | {"dropout": True, "causal": True}, {90: {64: (64, 32, 4, 1)}}),
    ("backward_short", PLAIN | {"bias": True, "dropout": True, "causal": True},
     {90: {64: (64, 32, 4, 1)}}),
]  # fmt: skip
# kernel -> its table without and with a position bias
TABLES = {
    "forward": (FORWARD, FORWARD_BIASED),
    "backward_q": (BACKWARD_Q, BACKWARD_Q_BIASED),
    "backward_kv": (BACKWARD_KV, BACKWARD_KV_BIASED),
    "backward_table": (BACKWARD_TABLE, BACKWARD_TABLE),
}


def settings(kernel, biased, head_dim, dtype, device, longest, dropout, bias, causal):
    """BLOCK_D and the entry for it, of the tables above; ``longest``: the most keys of a sequence,
    or, for "backward_short", the most keys or queries, and None where that kernel is not meant;
    ``biased``: by position; ``bias``: the projections'."""
    fma = not on_tensor_cores(dtype, device)
    chip = capability(device)
    return _settings(kernel, biased, head_dim, dtype, fma, chip, longest, dropout, bias, causal)


def on_tensor_cores(dtype, device):
    """Triton has no tensor-core instruction for 7.5."""
    return dtype != torch.float32 and capability(device) >= 80


@functools.lru_cache(4096)
def _settings(kernel, biased, head_dim, dtype, fma, chip, longest, dropout, bias, causal):
    block_d = max(32, power_of_2(head_dim))
    given = {"biased": biased, "bias": bias, "dropout": dropout, "causal": causal}

    def but(column, size, entry):
        for name, where, entries in EXCEPTIONS:
            if name == kernel and where.items() <= given.items():
                entry = entries.get(column, {}).get(size, entry)
        return entry

    short = {"forward": SHORT_BIASED if biased else SHORT, "backward_short": BACKWARD_SHORT}
    if not fma and block_d <= 64 and kernel in short:
        for most, entry in short[kernel].get(chip, short[kernel]["mma"]).items():
            if longest <= most and not (kernel == "forward" and dropout and most > 64):
                return block_d, but(chip, most, entry) if kernel == "backward_short" else entry
    if kernel == "backward_short":
        return block_d, None
    table = TABLES[kernel][biased]
    own = chip in table and dtype != torch.float32
    column = chip if own else "fma" if fma else "mma"
    entry = table[column][block_d]
    return block_d, but(column, block_d, entry)


def parts_of_sum(biased, device, dropout, bias, causal):
    """In how many parts forward sums a row while it goes through the keys. Tensor cores give a
    thread two columns of each eight: it sums its own and asks the others once, in the end. Those of
    10.0 give it whole rows; there, and on 9.0 beside a position bias, parts take instructions; with
    everything else beside a position bias they take one register too many. Plain FMA takes as many
    either way."""
    chip, heavy = capability(device), dropout and bias and causal
    return 1 if chip // 10 == 10 or (biased and (heavy or chip == 90)) else 8


def registers(warps, biased, causal, dtype):
    """All that 16 warps can have, and for float32 with a position bias or a causal mask what fits:
    left alone, ptxas stops before, and spills."""
    exact = dtype == torch.float32
    if warps == 16 or (exact and biased and warps == 8):
        return 128
    return 255 if exact and causal else None


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
