"""The CUDA backend's one kernel for all gradients (attention_mma_fused.cu), in the host build: when
it runs, and that it is level with the two kernels, which ``max_seqlen`` above 128 asks for where
there are few sequences for the GPU."""

import math

import pytest
import torch
from conftest import NO_CUDA_HOST, assert_within, cu_seqlens

from bert_fast import ops
from bert_fast.backends import cuda

pytestmark = pytest.mark.skipif(bool(NO_CUDA_HOST), reason=NO_CUDA_HOST or "it is here")
LONGEST = 128  # of its keys and queries, whatever the GPU
DROPPED = {"causal": True, "dropout_p": 0.25}

# Planted by test_cuda.py: what is there, what a tired hand might write.
FAULTS = [
    ("attention_mma_fused.cu", "part = warp % kDown * 16", "part = warp / kDown % kDown * 16"),
    ("attention_mma_fused.cu", "if (first < whole) hide_by_key", "if (false) hide_by_key"),
    ("attention_mma_fused.cu", "least[i] = key >= k_length ? INT32_MAX : a", "least[i] = a"),
    ("attention_mma_fused.cu", "whole = last >= k_length ? INT32_MAX : a", "whole = a"),
    ("attention_mma_fused.cu", "own_key - ahead - kTile + 1", "own_key - ahead + 1"),
    ("attention_mma_fused.cu", "store(by_key + (put_at ^ n * 8), 0u);", ""),
    ("attention_mma_fused.cu", "clear<T, kD, kTeam>(dqs);", ""),
    ("attention_mma_fused.cu", "clear<T, kD, kTeam>(dks);", ""),
    ("attention_mma_fused.cu", "factor = a.scale * sign", "factor = a.scale"),
    ("attention_mma_fused.cu", "key_of(lane / 4, 0), d =", "lane / 4, d ="),
    ("attention_mma_fused.cu", "odd ? first : second, 1", "odd ? second : first, 1"),
    ("attention_mma_fused.cu", "dq_left -= kTile;", ""),
    ("attention_mma_fused.cu", "min(valid, 4)", "4"),
    ("attention_mma_fused.cu", "part / 8 + lane / 8 % 2", "part / 8 + lane / 16"),
    ("attention_mma_fused.cu", "natural.at(k, i * 16, 2 * n)", "natural.at(k, 0, 2 * n)"),
    ("attention_mma_fused.cu", "k_length > kKeys) trap", "false) trap"),
    ("attention_mma_fused.cu", "return call.longest <= 128 ||", "return call.longest <= 256 ||"),
    ("attention_mma_fused.cu", "longest <= 128) return run", "longest <= 129) return run"),
    ("attention_mma_fused.cu", "turns >= 2", "turns >= 1"),
    ("attention_mma_fused.cu", "4 * ctas >= 3", "4 * ctas > 3"),
    ("attention_mma_fused.cu", "4 * ctas >= 3", "5 * ctas >= 3"),
    ("attention_mma_fused.cu", "ctas = a.batch * a.num_heads", "ctas = a.batch"),
    # Of sequences of several tiles of keys.
    ("attention_mma_fused.cu", "kLong && first_key && a.causal", "kLong && a.causal"),
    ("attention_mma_fused.cu", "max(0, first_key - ahead)", "max(0, first_key - ahead + kTile)"),
    ("attention_mma_fused.cu", "max(0, first_key - ahead)", "max(0, first_key)"),
    ("attention_mma_fused.cu", "a.causal ? next_key - ahead : 0", "0"),
    ("attention_mma_fused.cu", "a.causal ? next_key - ahead : 0", "a.causal ? next_key : 0"),
    ("attention_mma_fused.cu", "!kLong || next_key >= k_length ? INT", "!kLong ? INT"),
    ("attention_mma_fused.cu", "first + kTile <= complete", "first < complete"),
    ("attention_mma_fused.cu", "if (kLong && first_key) {", "if (kLong) {"),
    ("attention_mma_fused.cu", "if (kLong && first_key) {", "if (false) {"),
    ("attention_mma_fused.cu", "own_key = first_key + local", "own_key = local"),
    ("attention_mma_fused.cu", "kTeam>(ks, first_key)", "kTeam>(ks, 0)"),
    ("attention_mma_fused.cu", "queries(qs, begin), douts", "queries(qs, 0), douts"),
    ("attention_mma_fused.cu", "q_begin, q_length, begin)", "q_begin, q_length, 0)"),
    ("attention_mma_fused.cu", "(q_begin) + begin + row", "(q_begin) + row"),
    ("attention_mma_fused.cu", "q_length - begin - row", "q_length - row"),
    ("attention_mma_fused.cu", "local, dvs, first_key)", "local, dvs, 0)"),
    ("attention_mma_fused.cu", "sum + begin * kD", "sum"),
    ("attention_mma_fused.cu", "so_far += kTile * kD;", ";"),
    ("attention_mma_fused.cu", "store_16(so_far + n * kTeam * 4", "store_16(so_far"),
    ("attention_mma_fused.cu", "q_begin / kTile + sequence;", "q_begin / kTile;"),
    ("attention_mma_fused.cu", "head * tiles_of_sums", "tiles_of_sums"),
    ("attention_mma_fused.cu", "a.total_q / kTile + a.batch", "a.total_q / kTile"),
    ("attention_mma_fused.cu", "first_sum(a) + a.num_heads *", "first_sum(a) +"),
    ("attention_mma_fused.cu", "call.scratch + first_sum(a)", "call.scratch"),
    ("attention_mma_backward.h", "warp / 2 * 32 + warp % 2 * 8", "warp * 16"),
    ("attention_mma_backward.h", "lane / 8 % 2 * kKeysApart<kDrop>", "lane / 8 % 2 * 8"),
    ("attention_mma_fused.cu", "longest <= 64", "longest <= 65"),
    ("attention_mma_fused.cu", "load_queries(stage ^ 1)", "load_queries(stage)"),
    ("attention_mma_backward.h", "< least[i / 2] - query", "<= least[i / 2] - query"),
    ("attention_mma_backward.h", "length - row : 0", "length - first : 0"),
    ("attention_mma.h", "kParts > 1) from += step", "kParts > 2) from += step"),
]


@pytest.fixture
def small(monkeypatch):
    """A GPU of one multiprocessor, which two sequences fill. What scratch holds at first is not a
    number, and nothing is written past its end. Gives all there was, backward's last."""
    made = []

    def scratch(like, *shape):
        size = math.prod(shape)
        made.append(torch.full((size + 4096,), torch.nan))
        return made[-1][:size].view(shape)

    monkeypatch.setenv("BERT_FAST_HOST_MULTIPROCESSORS", "1")
    monkeypatch.setattr(cuda, "_scratch", scratch)
    yield made
    assert all(memory[-4096:].isnan().all() for memory in made)


def draw(dtype, *shape):
    return torch.randn(*shape).to(dtype)


def attention(qkv, dout, lengths, backend="cuda", max_seqlen=None, bias=None, **options):
    """[out, dqkv], and how many kernels the backward launched."""
    qkv = qkv.detach().requires_grad_()
    out = ops.attention_qkv(
        qkv, cu_seqlens(lengths), max_seqlen=max_seqlen, bias=bias, seed=5, backend=backend,
        padded_tail=True, **options,
    )  # fmt: skip
    before = cuda._kernels.launched()
    (grad,) = torch.autograd.grad(out, qkv, dout)
    return [out.detach(), grad], cuda._kernels.launched() - before


def theirs_of(qkv, dout, lengths, bias, **options):
    """[out, dqkv] of the definition, in the same dtype and in float64."""
    return [
        attention(*(t.to(exact) for t in (qkv, dout)), lengths, "eager", bias=bias.to(exact),
                  **options)[0]
        for exact in (qkv.dtype, torch.float64)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("longest", "head_dim", "dtype", "capability", "kernels"),
    [
        (1, 64, torch.bfloat16, 80, 2), (64, 64, torch.float16, 90, 2),
        (65, 20, torch.bfloat16, 86, 2), (128, 64, torch.float16, 80, 2),
        (129, 64, torch.bfloat16, 80, 3), (20, 72, torch.bfloat16, 80, 3),
        (20, 64, torch.float16, 75, 3), (20, 64, torch.float32, 80, 3),
    ],
)  # fmt: skip
def test_where_it_runs(monkeypatch, longest, head_dim, dtype, capability, kernels):
    """Beside the one for the rows' values: it alone, or that of dq and that of dk and dv."""
    monkeypatch.setenv("BERT_FAST_HOST_CAPABILITY", str(capability))
    qkv, dout = draw(dtype, longest, 3, 1, head_dim), draw(dtype, longest, 1, head_dim)
    assert attention(qkv, dout, [longest])[1] == kernels


def test_a_position_bias_has_the_others():
    qkv, table = draw(torch.bfloat16, 9, 3, 1, 64), torch.zeros(1, 9, 9)
    dout = draw(torch.bfloat16, 9, 1, 64)
    assert attention(qkv, dout, [9], position_bias=table)[1] == 3


@pytest.mark.parametrize(
    ("sequences", "heads", "multiprocessors", "kernels"),
    [(1, 1, 1, 3), (2, 1, 1, 2), (4, 1, 4, 3), (5, 1, 4, 3), (3, 2, 4, 2), (8, 1, 4, 2)],
)
def test_long_sequences_that_fill_the_gpu(monkeypatch, sequences, heads, multiprocessors, kernels):
    """Two turns of a CTA a multiprocessor, of which three quarters have work."""
    monkeypatch.setenv("BERT_FAST_HOST_MULTIPROCESSORS", str(multiprocessors))
    lengths, dtype = [LONGEST + 1] + [1] * (sequences - 1), torch.bfloat16
    qkv, dout = draw(dtype, sum(lengths), 3, heads, 8), draw(dtype, sum(lengths), heads, 8)
    assert attention(qkv, dout, lengths)[1] == kernels


@pytest.mark.parametrize(("head_dim", "queries"), [(64, 32), (32, 64)])
def test_each_sequence_and_head_has_its_own_sums(small, head_dim, queries):
    """Of the host build's blocks each runs to its end: that two share memory would not show. And
    where dq is not summed no memory is taken for it."""
    lengths, heads, dtype = [130, 7, 257, 0, 129], 2, torch.float16
    total = sum(lengths)
    qkv, dout = draw(dtype, total, 3, heads, head_dim), draw(dtype, total, heads, head_dim)
    assert attention(qkv, dout, lengths)[1] == 2
    tiles = sum(math.ceil(n / queries) for n in lengths if n > LONGEST)
    sums = small[-1][3 * heads * total :]
    assert sums.isfinite().sum() == heads * tiles * queries * head_dim
    attention(qkv[:130], dout[:130], [LONGEST, 2])
    assert small[-1].numel() == 4096 + 3 * heads * 130


@pytest.mark.parametrize("options", [{}, DROPPED], ids=str)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "lengths"),
    [
        (torch.float16, 64, [1, 0, 129, 257]),
        (torch.bfloat16, 64, [512, 0]),
        (torch.bfloat16, 64, [127, 128, 255]),
        (torch.float16, 32, [300, 129, 0, 256]),
        (torch.bfloat16, 21, [257, 1, 128, 127]),
    ],
    ids=str,
)
def test_long_sequences(small, dtype, head_dim, lengths, options):
    """Several tiles of keys, the last of one or a few; and rows past the last sequence."""
    tail, used = 40, sum(lengths)
    qkv, bias = draw(dtype, used + tail, 3, 1, head_dim), draw(dtype, 3, 1, head_dim) / 2
    dout = draw(dtype, used + tail, 1, head_dim)
    found, kernels = attention(qkv, dout, lengths, bias=bias, **options)
    assert kernels == 2
    assert not found[1][used:].any()
    assert_within(found, *theirs_of(qkv, dout, lengths, bias, **options), name="out, dqkv")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [21, 32, 64])
@pytest.mark.parametrize("options", [{}, DROPPED], ids=str)
@pytest.mark.parametrize("lengths", [[1, 63, 64, 65, 127, 128], [64, 1, 0, 33, 16]], ids=str)
def test_lengths_at_its_limits(dtype, head_dim, options, lengths):
    """In one batch, with rows past the last sequence."""
    tail, used = 70, sum(lengths)
    qkv, bias = draw(dtype, used + tail, 3, 1, head_dim), draw(dtype, 3, 1, head_dim) / 2
    dout = draw(dtype, used + tail, 1, head_dim)
    found, kernels = attention(qkv, dout, lengths, bias=bias, **options)
    others, more = attention(qkv, dout, lengths, bias=bias, max_seqlen=LONGEST + 1, **options)
    assert (kernels, more) == (2, 3)
    assert not found[1][used:].any()
    theirs = theirs_of(qkv, dout, lengths, bias, **options)
    assert_within(found, *theirs, name="out, dqkv")
    assert_within(others, *theirs, name="out, dqkv of two kernels")


@pytest.mark.parametrize("keys", [50, 128, 300])
def test_the_same_elements_are_dropped(monkeypatch, keys):
    """Of gradients with one number in each query's own column, dv shows which weights are there."""
    monkeypatch.setenv("BERT_FAST_HOST_MULTIPROCESSORS", "1")
    queries, dtype = 64, torch.bfloat16
    q, k, v = (draw(dtype, n, 1, 64) for n in (queries, keys, keys))

    def kept(backend, longest=None):
        values = v.detach().requires_grad_()
        out = ops.attention(
            q, k, values, cu_seqlens([queries, 0]), cu_seqlens([keys, 0]), max_seqlen=longest,
            seed=7, dropout_p=0.3, backend=backend,
        )  # fmt: skip
        before = cuda._kernels.launched()
        (grad,) = torch.autograd.grad(out, values, torch.eye(queries, dtype=dtype)[:, None])
        return grad != 0, cuda._kernels.launched() - before

    found, kernels = kept("cuda")
    assert kernels == 2
    assert 0.5 < found.float().mean() < 0.9
    monkeypatch.setenv("BERT_FAST_HOST_MULTIPROCESSORS", "100")
    others, more = kept("cuda", max(keys, LONGEST + 1))
    assert more == 3
    assert torch.equal(found, others)
    assert torch.equal(found, kept("eager")[0])


@pytest.mark.parametrize(("queries", "kernels"), [(128, 2), (129, 3)])
def test_queries_that_are_more_than_the_keys(queries, kernels):
    q, kv = draw(torch.bfloat16, queries, 1, 32), draw(torch.bfloat16, 2, 20, 1, 32)
    q.requires_grad_()
    out = ops.attention(q, *kv, cu_seqlens([queries]), cu_seqlens([20]), backend="cuda")
    before = cuda._kernels.launched()
    torch.autograd.grad(out, q, torch.ones_like(out))
    assert cuda._kernels.launched() - before == kernels


@pytest.mark.parametrize("options", [{}, DROPPED], ids=str)
@pytest.mark.parametrize("head_dim", [24, 64])
@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize(
    ("lengths", "keys"),
    [
        ([128, 0, 40, 70, 3, 1], [70, 3, 0, 128, 90, 1]),
        ([300, 0, 40, 20, 129], [130, 3, 0, 290, 257]),
    ],
    ids=str,
)
def test_keys_of_another_number_and_any_strides(small, options, head_dim, odd, lengths, keys):
    """More queries, none, no keys; tensors that cannot be moved by 16 bytes."""
    dtype = torch.bfloat16

    def strided(total):
        return draw(dtype, total + 40, 2, head_dim + odd)[..., odd:]

    q, k, v, dout = (strided(sum(n)) for n in (lengths, keys, keys, lengths))

    def run(backend, exact):
        taken = [t.to(exact).detach().requires_grad_() for t in (q, k, v)]
        if exact == dtype:  # as they lie
            taken = [t.detach().requires_grad_() for t in (q, k, v)]
        out = ops.attention(
            *taken, cu_seqlens(lengths), cu_seqlens(keys), seed=5, backend=backend,
            padded_tail=True, **options,
        )  # fmt: skip
        return [out.detach(), *torch.autograd.grad(out, taken, dout.to(exact))]

    found = run("cuda", dtype)
    assert_within(found, run("eager", dtype), run("eager", torch.float64), name="out, dq, dk, dv")
    assert not any(t[sum(n) :].any() for t, n in zip(found[1:], (lengths, keys, keys), strict=True))
    first = sum(lengths[:2])
    assert not found[1][first : first + lengths[2]].any()  # no keys


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[5, 37], [70], [133, 3]], ids=str)
def test_scores_far_below_zero(small, dtype, lengths):
    """Places without a key would have the greatest weight of all, and not a finite one."""
    qkv = draw(dtype, sum(lengths), 3, 1, 64)
    qkv[:, 0], qkv[:, 1] = 8, -8 + qkv[:, 1] / 8
    dout = draw(dtype, sum(lengths), 1, 64)
    found = attention(qkv, dout, lengths)[0]
    theirs = [
        attention(qkv.to(exact), dout.to(exact), lengths, "eager")[0]
        for exact in (dtype, torch.float64)
    ]
    assert_within(found, *theirs, name="out, dqkv")


@pytest.mark.parametrize("scale", [-0.2, 0.0])
@pytest.mark.parametrize("longest", [70, 140])
def test_a_scale_that_is_not_positive(small, scale, longest):
    qkv = draw(torch.bfloat16, longest + 10, 3, 1, 64)
    dout = draw(torch.bfloat16, longest + 10, 1, 64)
    run = [
        attention(qkv.to(exact), dout.to(exact), [longest, 10], backend, softmax_scale=scale)[0]
        for backend, exact in (
            ("cuda", torch.bfloat16), ("eager", torch.bfloat16), ("eager", torch.float64),
        )
    ]  # fmt: skip
    assert_within(*run, name="out, dqkv")


@pytest.mark.parametrize("head_dim", [32, 64])
def test_every_schedule_gives_the_same_bits(monkeypatch, small, head_dim):
    qkv, dout = draw(torch.bfloat16, 230, 3, 1, head_dim), draw(torch.bfloat16, 230, 1, head_dim)
    bias = draw(torch.bfloat16, 3, 1, head_dim)

    def run():
        return [
            t
            for lengths in ([100, 128], [64, 40, 60], [191, 34])
            for options in ({}, DROPPED)
            for t in attention(qkv, dout, lengths, bias=bias, **options)[0]
        ]

    first = run()
    for seed in range(1, 5):
        monkeypatch.setenv("BERT_FAST_HOST_SEED", str(seed))
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_more_keys_than_max_seqlen_says():
    qkv, dout = draw(torch.bfloat16, 70, 3, 1, 64), draw(torch.bfloat16, 70, 1, 64)
    out, lse = ops.attention_qkv(qkv, cu_seqlens([70]), backend="cuda"), torch.zeros(1, 70)
    grad = torch.empty(3, 70, 1, 64, dtype=torch.bfloat16)
    cu, (q, k, v) = cu_seqlens([70]), qkv.unbind(1)
    with pytest.raises(RuntimeError, match="max_seqlen is below the longest sequence"):
        cuda.attention_backward(
            dout, q, k, v, out, lse, cu, cu, 64, 64, None, 0.125, False, 0.0, None, *grad
        )
