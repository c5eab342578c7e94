"""The definition of every op, in plain PyTorch: differentiable, any device, any float dtype.

This is the ``eager`` backend, and what every kernel is tested against. It computes in its inputs'
dtype, so in float64 it is the truth and in bfloat16 it makes the errors PyTorch itself makes.
Nothing here waits for the device.
"""

import math

import torch
import torch.nn.functional as F

_U32 = 0xFFFFFFFF
LAYER_NORM_STREAM = _U32


def _philox_round(counter, key):
    c0, c1, c2, c3 = counter
    # int64 products of 32-bit words wrap, but the shift and mask still find both halves.
    p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
    high0, high1 = (p0 >> 32) & _U32, (p1 >> 32) & _U32
    return high1 ^ c1 ^ key[0], p1 & _U32, high0 ^ c3 ^ key[1], p0 & _U32


def philox(seed, counter, rounds=7):
    """Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; seven rounds
    are the fewest that pass BigCrush) of a counter's four words, keyed by ``seed``."""
    key = [seed & _U32, (seed >> 32) & _U32]
    for _ in range(rounds):
        counter = _philox_round(counter, key)
        key = [(key[0] + 0x9E3779B9) & _U32, (key[1] + 0xBB67AE85) & _U32]
    return counter


def dropout_factors(seed, p, columns, c1, c2, c3):
    """0 where an element is dropped, else 1 / (1 - p), p in whole 65536ths, some and not all.

    :func:`philox` counted by position: the element in column ``col`` is dropped by 16 bits, half
    ``col % 2`` (0: the low one) of word ``col % 8 // 2`` of the counter ``(col // 8, c1, c2, c3)``.
    All arguments but ``p`` are integers or int64 tensors that broadcast together. Returns a float64
    tensor.
    """
    counter = torch.broadcast_tensors(columns // 8, *(c + 0 * columns for c in (c1, c2, c3)))
    words = torch.stack(philox(seed, counter), dim=-1)
    which = (columns % 8).expand(words.shape[:-1])[..., None]
    bits = torch.take_along_dim(words, which // 2, dim=-1) >> which % 2 * 16 & 0xFFFF
    cut = min(max(int(p * 65536 + 0.5), 1), 65535)
    return (bits[..., 0] >= cut).double() * (65536 / (65536 - cut))


def column_of_key(key):
    """Which column of :func:`dropout_factors` a key of attention has: eight of a draw are four
    neighbouring keys and the four that are 16 further, which a thread of the tensor cores has."""
    return key // 32 * 32 + key % 16 // 4 * 8 + key % 4 * 2 + key % 32 // 16


def sequence_of_token(cu_seqlens, total):
    """For each packed row its sequence and its position there; rows past the last sequence get
    the sequence ``batch``."""
    token = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.bucketize(token, cu_seqlens[1:].long(), right=True)
    return sequence, token - cu_seqlens.long()[sequence]


def _pad(packed, cu_seqlens, max_seqlen):
    """(total, ...) -> (batch, max_seqlen, ...) and its mask of real rows."""
    begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    index = begin[:, None] + torch.arange(max_seqlen, device=packed.device)
    real = index < end[:, None]
    padded = packed[index.clamp(max=max(packed.shape[0] - 1, 0))]
    return padded.where(real[(...,) + (None,) * (packed.ndim - 1)], 0), real


def attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    bias=None, softmax_scale=None, causal=False, dropout_p=0.0, seed=None, position_bias=None,
):  # fmt: skip
    """softmax(Q K^T * softmax_scale + position_bias) V for each sequence and head (Vaswani et al.
    2017, eq. 1; the bias as in Raffel et al. 2020, section 2.1).

    Shapes as in :func:`bert_fast.attention`. Returns ``out`` (total_q, num_heads, head_dim) and
    ``lse`` (num_heads, total_q), the log-sum-exp of each row's scaled scores. A row that sees no
    key gets zeros, and -inf in ``lse``.
    """
    (total_q, num_heads, head_dim), batch = q.shape, cu_seqlens_q.numel() - 1
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    if bias is not None:
        q, k, v = q + bias[0], k + bias[1], v + bias[2]
    if 0 in (total_q, k.shape[0], batch, num_heads):
        empty = (q.sum() + k.sum() + v.sum()) * 0  # zeros, and still part of the graph
        if position_bias is not None:
            empty = empty + position_bias[:0].sum()
        return q * 0 + empty, q.new_full((num_heads, total_q), -math.inf)
    for cu_seqlens, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        fits = (cu_seqlens.diff() <= longest).all()
        torch._assert_async(fits, "max_seqlen is below the longest sequence")
    q, _ = _pad(q, cu_seqlens_q, max_seqlen_q)
    k, real_k = _pad(k, cu_seqlens_k, max_seqlen_k)
    v, _ = _pad(v, cu_seqlens_k, max_seqlen_k)

    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    hidden = ~real_k[:, None, None, :]
    if position_bias is not None:
        position_bias = position_bias[:, :max_seqlen_q, :max_seqlen_k]
        scores = scores + position_bias
    hidden = hidden | (scores == -math.inf)  # by the bias or by overflow: its gradient is zero
    row = torch.arange(max_seqlen_q, device=q.device)[:, None]
    col = torch.arange(max_seqlen_k, device=q.device)
    if causal:  # aligned to the bottom right: the last query sees the last key
        shift = cu_seqlens_k.diff() - cu_seqlens_q.diff()
        hidden = hidden | (col > row + shift[:, None, None, None])
    scores = scores.masked_fill(hidden, -math.inf)
    lse = scores.logsumexp(dim=-1)
    # Not softmax(): a row without keys must give zeros and zero gradients, not NaN.
    probabilities = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    if dropout_p > 0:
        head = torch.arange(num_heads, device=q.device)[:, None, None]
        sequence = torch.arange(batch, device=q.device)[:, None, None, None]
        factors = dropout_factors(seed, dropout_p, column_of_key(col), row, head, sequence)
        probabilities = probabilities * factors.to(q.dtype)
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities, v)

    sequence, position = sequence_of_token(cu_seqlens_q, total_q)
    real = sequence < batch  # false in the tail of a buffer of fixed capacity
    sequence = sequence.clamp(max=batch - 1)
    position = position.clamp(max=max_seqlen_q - 1)
    out = out[sequence, position].where(real[:, None, None], 0)
    return out, lse[sequence, :, position].where(real[:, None], -math.inf).T


def layer_norm(
    x, weight, bias, residual=None, linear_bias=None, eps=1e-12, dropout_p=0.0, seed=None
):
    """LN(residual + dropout(x + linear_bias)) * weight + bias (Ba et al. 2016, eq. 4), with the
    variance over the last dimension's ``hidden`` elements (not hidden - 1)."""
    hidden = x.shape[-1]
    if linear_bias is not None:
        x = x + linear_bias
    if dropout_p > 0:
        row = torch.arange(x.numel() // max(hidden, 1), device=x.device)[:, None]
        col = torch.arange(hidden, device=x.device)
        factors = dropout_factors(seed, dropout_p, col, row, 0, LAYER_NORM_STREAM)
        x = x * factors.to(x.dtype).view(x.shape)
    if residual is not None:
        x = residual + x
    return F.layer_norm(x, (hidden,), weight, bias, eps)


def gelu(x, bias=None, approximate="none"):
    """x Phi(x), of ``x + bias`` (Hendrycks & Gimpel 2016): Phi by erf, or by their tanh."""
    if bias is not None:
        x = x + bias
    return F.gelu(x, approximate=approximate)


LARGEST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max  # 448
# Below it a scale's inverse would overflow: rows this near to zero, and of zeros, share it.
LEAST_FLOAT8_SCALE = 2.0**-126


def float8(x):
    """Rows of float8_e4m3fn (Micikevicius et al. 2022), x / scale rounded to nearest, and each
    row's float32 scale, its largest magnitude / 448.

    So no element is beyond 448 by more than float32's roundings, which e4m3's own takes back:
    nothing overflows. A NaN is no row's largest and stays one; beside an infinity, whose row's
    scale is infinite, finite elements are 0 and it is NaN itself. Either makes all of the row's
    products NaN.
    """
    x = x.float()
    largest = x.abs().masked_fill(x.isnan(), 0).amax(-1)
    scale = (largest / LARGEST_FLOAT8).clamp(min=LEAST_FLOAT8_SCALE)
    return (x * (1 / scale)[..., None]).to(torch.float8_e4m3fn), scale


def float8_product(elements, scale, weight, weight_scale, bias=None):
    """x Wᵀ + bias in bfloat16 of rows and a weight as :func:`float8` gives them. In float64 each
    sum is exact, up to 2^17 terms."""
    total = F.linear(elements.double(), weight.double()).float() * scale[:, None] * weight_scale
    return (total if bias is None else total + bias).bfloat16()
