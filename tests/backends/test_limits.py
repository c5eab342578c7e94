"""Where numbers end, on every backend: rows without a finite score, shapes without elements, rows
far apart in memory, a max_seqlen that is too small, a launch that CUDA refuses."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HAS_GPU, NO_CUDA_HOST, TRITON, assert_within, cu_seqlens

from bert_fast import backends, ops

ROOT = Path(__file__).resolve().parents[2]


def on_backend(name, dtype, *tensors):
    """Attention's output, lse and gradients of leaves that need one."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out, lse = ops.attention(*leaves, cu_seqlens([5, 70]).to(leaves[0].device), causal=True,
                             return_lse=True, backend=name)  # fmt: skip
    dout = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape).to(out.device)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)], lse.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_whose_scores_are_all_minus_infinity(backend, dtype):
    """By overflow: of one sequence the first rows, of the other one in the midst and the last.
    Zeros, with -inf for lse, and gradients as if the rows were not there; the rest as ever."""
    q, k, v = torch.randn(3, 75, 2, 32)
    gone = torch.zeros(75, dtype=torch.bool)
    gone[[0, 1, 7, 74]] = True
    k[..., 0] = 1e20
    q[..., 0] = 0
    q[gone, :, 0] = -1e20  # 1e40: past float32, and past bfloat16, which has its exponent
    q, k, v = (t.to(dtype) for t in (q, k, v))
    (out, *gradients), lse = on_backend(backend, dtype, q, k, v)
    assert out[gone].eq(0).all()
    assert lse[:, gone].eq(-math.inf).all()
    assert lse[:, ~gone].isfinite().all()
    assert all(g.isfinite().all() for g in (out, *gradients))
    assert gradients[0][gone].eq(0).all()
    # What is not there: no query of its own, and no share in the gradients of k and v. The column
    # that overflows is zero for the others, and so are its products.
    q, k = (torch.cat([torch.zeros_like(t[..., :1]), t[..., 1:]], -1) for t in (q, k))
    found = []
    for exact in (dtype, torch.float64):
        leaves = [t.detach().cpu().to(exact).requires_grad_() for t in (q, k, v)]
        cu = cu_seqlens([5, 70]).cpu()
        plain = ops.attention(*leaves, cu, causal=True, backend="eager")
        plain = plain * ~gone.cpu()[:, None, None]
        dout = torch.linspace(-1, 1, out.numel(), dtype=dtype, device="cpu")
        dout = dout.view(out.shape).to(exact)
        found.append([plain.detach(), *torch.autograd.grad(plain, leaves, dout)])
    ours = [t.cpu() for t in (out, *gradients)]
    for mine, plain, truth in zip(ours, *found, strict=True):
        assert_within(mine[..., 1:].clone(), plain[..., 1:].clone(), truth[..., 1:].clone())


@pytest.mark.parametrize("shape", [(9, 0, 8), (0, 2, 8), (0, 0, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_without_heads_or_tokens(backend, shape, dtype):
    qkv = torch.randn(shape[0], 3, *shape[1:], dtype=dtype, requires_grad=True)
    bias = torch.randn(3, *shape[1:], dtype=dtype, requires_grad=True)
    cu = cu_seqlens([4, 5] if shape[0] else [0]).to(qkv.device)
    for options in ({}, {"dropout_p": 0.1, "causal": True}):
        out, lse = ops.attention_qkv(qkv, cu, bias=bias, return_lse=True, **options)
        assert (out.shape, lse.shape) == (shape, (shape[1], shape[0]))
        dqkv, dbias = torch.autograd.grad(out, [qkv, bias], torch.randn_like(out))
        assert (dqkv.shape, dbias.shape) == (qkv.shape, bias.shape)
        assert dbias.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_others_without_rows(backend, dtype):
    """Gradients of parameters are zeros, not what was in memory."""
    wide = torch.randn(12, requires_grad=True)
    weight = torch.randn(12, 12).to(dtype).requires_grad_()
    x = torch.randn(0, 12, dtype=dtype, requires_grad=True)
    ids = torch.zeros(0, dtype=torch.long)
    table = torch.randn(5, 12, dtype=dtype, requires_grad=True)
    for out, leaves in (
        (ops.layer_norm(x, wide, wide, residual=x, linear_bias=wide, dropout_p=0.1), [x, wide]),
        (ops.gelu(x, wide), [x, wide]),
        (ops.linear_gelu(x, weight, wide.to(dtype)), [x, weight, wide]),
        (ops.embedding_layer_norm(ids, ids, ids, table, table, table, wide, wide), [table, wide]),
    ):
        assert out.shape == (0, 12)
        for leaf, gradient in zip(
            leaves, torch.autograd.grad(out, leaves, torch.randn_like(out)), strict=True
        ):
            assert gradient.shape == leaf.shape
            assert gradient.eq(0).all()


# Rows so far apart that the third begins past 2^31 elements; no file system stores what is not
# written.
APART = 2**30 + 16


@pytest.fixture
def apart(tmp_path):
    """apart(a packed tensor): the same numbers, in rows that are far apart; of up to 16 tensors
    side by side in one memory, of 4 GB."""
    file, made = tmp_path / "rows", []

    def spread(tensor):
        width = 64  # a row's, and what is left to the next tensor's
        assert len(made) < 16
        assert tensor[0].numel() < width
        size = 2 * APART + 16 * width
        if not made and tensor.device.type == "cpu":
            bytes_ = size * tensor.element_size()
            storage = torch.UntypedStorage.from_file(str(file), True, bytes_)
            made.append(torch.tensor([], dtype=tensor.dtype).set_(storage))
        elif not made:
            made.append(torch.empty(size, dtype=tensor.dtype))
        else:
            made.append(made[0])
        strides = APART, *tensor.stride()[1:]
        return made[0].as_strided(tensor.shape, strides, width * (len(made) - 1)).copy_(tensor)

    yield spread
    file.unlink(missing_ok=True)


def test_rows_past_two_to_the_31_elements(backend, apart):
    """Of one sequence, read and written: offsets are 64 bits wide."""
    if backend == "eager":
        pytest.skip("torch's own indexing")
    torch.utils.deterministic.fill_uninitialized_memory = False  # of what the file does not hold
    dtype, device = torch.bfloat16, torch.get_default_device()
    cu = cu_seqlens([3]).to(device)
    options = (cu, cu, 3, 3, None, 0.25, False, 0.0, None)
    module = backends.module(backend)
    near = [torch.randn(3, 2, 16).to(dtype) for _ in range(4)]
    q, k, v, dout = near

    def run(q, k, v, dout, make):
        out, lse = module.attention_forward(q, k, v, *options, out=make(torch.zeros_like(near[0])))
        gradients = [make(torch.zeros_like(near[0])) for _ in range(3)]
        module.attention_backward(dout, q, k, v, out, lse, *options, *gradients)
        return [out, *gradients]

    wanted = run(q, k, v, dout, lambda t: t)
    found = run(*map(apart, near), apart)
    assert all(t.stride(0) == APART for t in found)
    for a, b in zip(wanted, found, strict=True):
        assert a.ne(0).any()
        assert torch.equal(a, b.contiguous())


TOO_SMALL = "max_seqlen is below the longest sequence"


@pytest.fixture
def asserting(monkeypatch):
    """Triton's interpreter checks device_assert, as a launch with debug=True does on a device."""
    if TRITON and not HAS_GPU:
        from triton.runtime.interpreter import interpreter_builder as builder

        options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=False)
        monkeypatch.setattr(builder, "options", options)


def test_a_max_seqlen_that_is_too_small(backend, asserting):
    """Where cu_seqlens cannot be looked at, as on a device: whoever relies on it stops, and who
    does not computes what is right."""
    if torch.get_default_device().type == "cuda":
        pytest.skip("it ends the process's work on the device: the test below has its own")
    cu, stopped = cu_seqlens([140, 7]), []
    for dtype, wide in ((torch.bfloat16, 64), (torch.float32, 32)):
        q, k, v = torch.randn(3, 147, 1, wide).to(dtype)
        wanted, _ = ops.reference.attention(q, k, v, cu, cu, 140, 140)
        function = ops.reference.attention
        if backend != "eager":
            function = backends.module(backend).attention_forward
        for said in (7, 32, 128, 139, 140):
            try:
                out, _ = function(
                    q, k, v, cu, cu, said, said, None, 1 / math.sqrt(wide), False, 0.0, None
                )
            except Exception as error:
                stopped.append((dtype, said, f"{error} {error.__cause__}"))
            else:
                torch.testing.assert_close(out, wanted, atol=0.05, rtol=0.05)
    assert all(TOO_SMALL in message and said < 140 for _, said, message in stopped)
    bf16 = {said for dtype, said, _ in stopped if dtype == torch.bfloat16}
    if backend == "eager":
        assert bf16 == {7, 32, 128, 139}
    elif backend in ("triton", "cuda"):  # one of its schedules holds all keys at once
        assert bf16 >= {7, 32}
    else:
        assert not bf16


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_max_seqlen_that_is_too_small_for_backward(asserting, dropout_p):
    """As above: short sequences are one tile in Triton."""
    if not TRITON or HAS_GPU:
        pytest.skip("Triton's interpreter is not here")
    cu, stopped = cu_seqlens([300, 7]), []
    q, k, v, dout = torch.randn(4, 307, 1, 16).bfloat16()
    module, seed = backends.module("triton"), torch.tensor([5])
    rest = None, 0.25, False, dropout_p, seed if dropout_p else None
    out, lse = module.attention_forward(q, k, v, cu, cu, 300, 300, *rest)

    def run(said):
        grads = [torch.empty_like(q) for _ in range(3)]
        module.attention_backward(dout, q, k, v, out, lse, cu, cu, said, said, *rest, *grads)
        return grads

    wanted = run(300)
    for said in (7, 128, 129, 256, 257):
        try:
            found = run(said)
        except Exception as error:
            stopped.append((said, f"{error} {error.__cause__}"))
        else:
            assert all(map(torch.equal, found, wanted))
    assert [said for said, _ in stopped] == [7, 128]
    assert all(TOO_SMALL in message for _, message in stopped)


STOPPED = """
import sys
import torch
from bert_fast import ops
cu = torch.tensor([0, 140, 147], dtype=torch.int32, device="cuda")
q = torch.randn(147, 1, 64, device="cuda", dtype=torch.bfloat16)
try:
    print(ops.attention(q, q, q, cu, max_seqlen=7, backend=sys.argv[1]).sum().item())
except RuntimeError as error:
    print("stopped", error)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU; interpreted, it ran without one")
@pytest.mark.parametrize("name", ["eager", "triton", "cuda"])
def test_a_max_seqlen_that_is_too_small_on_a_gpu(name):
    if reason := backends.why_unavailable(name):
        pytest.skip(reason)
    answer = subprocess.run(
        [sys.executable, "-c", STOPPED, name], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.stdout.startswith("stopped"), answer.stdout + answer.stderr[-2000:]


@pytest.mark.skipif(bool(NO_CUDA_HOST), reason=NO_CUDA_HOST or "it is here")
def test_a_refused_launch_is_named_once_and_the_next_runs():
    """More heads than a grid has rows."""
    q, cu = torch.randn(2, 65536, 1, dtype=torch.bfloat16), cu_seqlens([2])
    few = q[:, :3].contiguous()
    before = ops.attention(few, few, few, cu, backend="cuda")
    with pytest.raises(RuntimeError) as error:
        ops.attention(q, q, q, cu, backend="cuda")
    assert str(error.value) == (
        "cuda_attention_forward (2 and 2 tokens, 65536 heads of 1) on cuda:0: "
        "invalid configuration argument"
    )
    assert torch.equal(ops.attention(few, few, few, cu, backend="cuda"), before)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU; test_fused_backward.py ran without")
@pytest.mark.parametrize("options", [{}, {"causal": True, "dropout_p": 0.2}], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64])
def test_long_sequences_that_fill_a_gpu(head_dim, options):
    """So many that the CUDA backend makes all gradients of long sequences by one kernel."""
    if reason := backends.why_unavailable("cuda"):
        pytest.skip(reason)
    count = torch.cuda.get_device_properties(0).multi_processor_count
    lengths = [i * 37 % 390 for i in range(count)]
    leaves = [torch.randn(sum(lengths), 2, head_dim, device="cuda") for _ in range(4)]
    low = [t.to(torch.bfloat16) for t in leaves]

    def run(backend, dtype=torch.bfloat16):
        *taken, dout = (t.to(dtype).requires_grad_() for t in low)
        out = ops.attention(
            *taken, cu_seqlens(lengths).cuda(), max_seqlen=389, seed=5, backend=backend, **options
        )
        return [t.detach() for t in (out, *torch.autograd.grad(out, taken, dout))]

    found = run("cuda")
    assert_within(found, run("eager"), run("eager", torch.float64), name="out, dq, dk, dv")
    assert all(torch.equal(a, b) for a, b in zip(found, run("cuda"), strict=True))
