"""Others' kernels: found by name, counted where they are, and named where they are not."""

import importlib.util
import json
import types
from pathlib import Path

import pytest
import torch
from conftest import compiling, json_of

from bert_fast import cli
from bert_fast.inspect import peers as module
from bert_fast.inspect.inductor import NotWritten

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)

ROWS, COLS = 128, 64
PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR24], R24"
# As c++filt gives them.
NAMES = {
    "FlashAttention-3": "FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2, "
    "cute::tuple<cute::C<1>, cute::C<1>, cute::C<1> >, "
    "cute::tuple<cute::C<{rows}>, cute::C<{cols}>, cute::C<64> >, 64, "
    "cutlass::bfloat16_t, float, cutlass::arch::Sm90, {flag}, false, false, false, false, false, "
    "false, false, true, false, false, false>, flash::CollectiveEpilogueFwd<...> > >",
    "FlashAttention-2": "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<"
    "64, {rows}, {cols}, 4, false, false, cutlass::bfloat16_t, "
    "Flash_kernel_traits<64, {rows}, {cols}, 4, cutlass::bfloat16_t> >, "
    "{flag}, false, false, false, true, true, false, false>(flash::Flash_fwd_params)",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_librarys_kernel_is_counted(name, monkeypatch):
    library = module.LIBRARIES[name]
    right, wrong = (NAMES[name].format(rows=ROWS, cols=COLS, flag=f) for f in ("false", "true"))
    warps = ROWS // library.rows
    of_a_warp = 2 * 16 * 64 * 16
    number = 2 * 2 * ROWS * COLS * 64 // warps // of_a_warp
    body = [PRODUCT] * number + ["FFMA R4, R4, R5, R6"] * 100 + ["@P0 BRA 0x0", "EXIT"]
    sass = "\n".join(f"/*{16 * i:04x}*/ {text} ;" for i, text in enumerate(body))

    def cuobjdump(flag, *arguments):
        if flag == "-res-usage":
            return "".join(f"Function {n}:\n  REG:{r} STACK:0 SHARED:0\n" for n, r in
                           [("_causal", 90), ("_plain", 100)])  # fmt: skip
        assert arguments[-2] == "_plain"
        return f"Function : _plain\n{sass}"

    real = module.subprocess.run
    monkeypatch.setattr(module, "cuobjdump", cuobjdump)
    monkeypatch.setattr(
        module.subprocess, "run",
        lambda *args, **options: real(["cat"], **options | {"input": f"{wrong}\n{right}"}),
    )  # fmt: skip
    chip = next(iter(library.archs))
    (found,) = module.attention(name, library, Path("library.so"), chip)
    assert (found.registers, found.num_warps) == (100, warps + library.loading)
    assert found.counts.repeated == 1
    assert found.counts.an_element == (number + 101) * 32 * warps / (ROWS * COLS)
    assert not list(module.attention(name, library, Path("library.so"), 75))


@pytest.fixture
def nothing_of_ours(monkeypatch):
    monkeypatch.setattr("bert_fast.inspect.inspect", lambda *_: [])
    monkeypatch.setattr("bert_fast.inspect.cuda_kernels", lambda *_: [])


def test_what_is_not_there_is_said_by_name(monkeypatch, capsys, nothing_of_ours):
    def inductor(chip):
        raise NotWritten("torch has no [/x] GraphLowering[int]")

    util = types.SimpleNamespace(find_spec=lambda name: None)
    monkeypatch.setattr(module, "importlib", types.SimpleNamespace(util=util))
    monkeypatch.setattr(module, "inductor", inductor)
    assert cli.main(["inspect", "--chips", "90", "--peers"]) == 0
    shown = capsys.readouterr().out
    for name, package in [
        ("FlashAttention-2", "flash_attn_2_cuda"), ("FlashAttention-3", "fa3_fwd"),
        ("Liger", "liger_kernel"),
    ]:  # fmt: skip
        assert f"{name}: not counted, {package} is not installed" in shown
    assert "Triton's tutorial: not counted, --tutorial gives its file" in shown
    assert "torch's Inductor on 90: not counted, torch has no [/x] GraphLowering[int]" in shown
    assert cli.main(["inspect", "--chips", "75", "--tutorial", __file__]) == 0
    assert "tutorial before 8.0: not counted, it is for later chips" in capsys.readouterr().out


# With the entry points of Triton's 06-fused-attention.py, and the least of its work.
TUTORIAL = """
import torch
import triton
import triton.language as tl

assert torch.cuda.get_device_capability() == (9, 0)
assert triton.runtime.driver.active.get_current_target().arch == 90
tiles = [triton.Config({"BLOCK_M": 64, "BLOCK_N": n}, num_warps=4) for n in (32, 64, 128)]

@triton.jit
def tile(start, stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    return (start + tl.arange(0, ROWS))[:, None] * stride + tl.arange(0, COLS)[None, :]

@triton.autotune(tiles, key=["N_CTX"])
@triton.jit
def _attn_fwd(Q, K, V, Out, sm_scale, N_CTX, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):
    tl.static_assert(BLOCK_N <= HEAD_DIM)
    rows = tile(tl.program_id(0) * BLOCK_M, HEAD_DIM, BLOCK_M, HEAD_DIM)
    q = tl.load(Q + rows)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in range(0, N_CTX, BLOCK_N):
        cols = tile(start, HEAD_DIM, BLOCK_N, HEAD_DIM)
        p = tl.exp2(tl.dot(q, tl.trans(tl.load(K + cols))) * sm_scale - 1.0)
        acc = tl.dot(p.to(tl.float16), tl.load(V + cols), acc)
    tl.store(Out + rows, acc.to(tl.float16))

@triton.jit
def _attn_bwd(Q, K, V, DO, DQ, DK, DV, N_CTX, HEAD_DIM: tl.constexpr, BLOCK_M1: tl.constexpr,
              BLOCK_N1: tl.constexpr, BLOCK_M2: tl.constexpr, BLOCK_N2: tl.constexpr):
    own = tile(tl.program_id(0) * BLOCK_N1, HEAD_DIM, BLOCK_N1, HEAD_DIM)
    k, v = tl.load(K + own), tl.load(V + own)
    dk = tl.zeros([BLOCK_N1, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N1, HEAD_DIM], tl.float32)
    for start in range(0, N_CTX, BLOCK_M1):
        others = tile(start, HEAD_DIM, BLOCK_M1, HEAD_DIM)
        other_q, other_do = tl.load(Q + others), tl.load(DO + others)
        p = tl.exp2(tl.dot(k, tl.trans(other_q)))
        dv = tl.dot(p.to(tl.float16), other_do, dv)
        ds = p * tl.dot(v, tl.trans(other_do))
        dk = tl.dot(ds.to(tl.float16), other_q, dk)
    tl.store(DK + own, dk.to(tl.float16))
    tl.store(DV + own, dv.to(tl.float16))
    q, do = tl.load(Q + own), tl.load(DO + own)
    dq = tl.zeros([BLOCK_M2, HEAD_DIM], tl.float32)
    for start in range(0, N_CTX, BLOCK_N2):
        others = tile(start, HEAD_DIM, BLOCK_N2, HEAD_DIM)
        other_k, other_v = tl.load(K + others), tl.load(V + others)
        ds = tl.exp2(tl.dot(q, tl.trans(other_k))) * tl.dot(do, tl.trans(other_v))
        dq = tl.dot(ds.to(tl.float16), other_k, dq)
    tl.store(DQ + own, dq.to(tl.float16))

class _attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, sm_scale, warp_specialize=True):
        assert not (causal or warp_specialize)
        ctx.save_for_backward(q, k, v)
        out = torch.empty_like(q)
        _attn_fwd[lambda meta: (triton.cdiv(q.shape[2], meta["BLOCK_M"]), q.shape[0] * q.shape[1])](
            q, k, v, out, sm_scale, N_CTX=q.shape[2], HEAD_DIM=q.shape[3])
        return out

    @staticmethod
    def backward(ctx, do):
        gradients = [torch.empty_like(x) for x in ctx.saved_tensors]
        _attn_bwd[(8, 384)](*ctx.saved_tensors, do, *gradients, do.shape[2], HEAD_DIM=64,
                            BLOCK_M1=32, BLOCK_N1=64, BLOCK_M2=64, BLOCK_N2=32)
        return *gradients, None, None, None

attention = _attention.apply

if __name__ == "__main__":
    raise SystemExit("its benchmark")
"""
COUNTED = """
import json, sys
import torch
from triton.runtime import driver
from bert_fast import inspect
from bert_fast.inspect.tutorial import tutorial

had_gpu = torch.cuda.is_available()
rows = [inspect.row(c) for c in tutorial(sys.argv[1], 90)]
assert driver._active is None and torch.cuda.is_available() is had_gpu, "a GPU is still pretended"
print(json.dumps(rows))
"""


@needs_triton
def test_the_tutorials_loops_are_counted(tmp_path):
    path = tmp_path / "06-fused-attention.py"
    path.write_text(TUTORIAL)
    forward, backward = json_of(compiling("-c", COUNTED, path))
    # Of its tiles the leanest; the widest its kernel refuses.
    assert forward["kernel"] == "tutorial, 64 x 64, 3 stages"
    assert forward["work"] == "Triton's tutorial, attention, 32 x 512, 12 heads of 64, float16"
    assert forward["grid"]["ragged"] == 0
    assert backward["kernel"] == "tutorial, 32 x 64 and 64 x 32, 3 stages"
    for row, products in ((forward, 2), (backward, 7)):
        counts, elements = row["counts"], 64 * (64 if row is forward else 32)
        assert row["products"].startswith("HGMMA")
        assert counts["loop"]
        # All its products are in what was counted, both of backward's loops' and nothing twice.
        assert counts["executed"] == counts["tile"]["flops"] == 2 * products * elements * 64
        assert counts["repeated"] == 1
    # One exponential a score, in backward one a loop.
    assert forward["counts"]["exponentials"] * 32 * 4 == 64 * 64
    assert backward["counts"]["exponentials"] * 32 * 4 == 2 * 64 * 32
    # And scaling and shifting it are one instruction, as Triton makes them where nobody says.
    assert forward["counts"]["pipes"]["fma"] < 1.5 * 64 * 64 / (32 * 4)


@needs_triton
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is no file"),
        ("import no_such_package", "does not run as Triton's tutorial: ModuleNotFoundError"),
        ("def attention(:", "does not run as Triton's tutorial: SyntaxError"),
        ("x = 1", "has no attribute 'attention'"),
        ("raise SystemExit(0)", "does not run as Triton's tutorial: SystemExit"),
        ("def attention(q, *_):\n    return q * 2", "launches no _attn_fwd"),
    ],
)
def test_a_wrong_tutorial_is_refused_by_name(text, said, tmp_path, capsys, nothing_of_ours):
    path, had_gpu = tmp_path / "tutorial.py", torch.cuda.is_available()
    if text:
        path.write_text(text)
    assert cli.main(["inspect", "--chips", "90", "--tutorial", str(path)]) == 1
    answer = capsys.readouterr().err
    assert f"--tutorial: {path}" in answer
    assert said in answer
    assert not list(tmp_path.glob("__pycache__"))
    assert torch.cuda.is_available() is had_gpu, "a GPU is still pretended"


@needs_triton
@pytest.mark.full
def test_inductor(tmp_path):
    out = tmp_path / "counted.json"
    command = "inspect", "--chips", "90", "--names", "none of ours", "--peers", "--json", out
    answer = compiling("-m", "bert_fast.cli", *command)
    assert answer.returncode == 0, answer.stderr[-3000:]
    rows = [r for r in json.loads(out.read_text()) if r["work"].startswith("torch's Inductor")]
    norm, gelu = rows
    assert "bias + residual + layer-norm, 16384 x 768" in norm["work"]
    assert "bias + gelu, 16384 x 3072" in gelu["work"]
    for row, loads in ((norm, 5), (gelu, 2)):
        counts = row["counts"]
        assert row["widest_load"] == 128
        assert counts["loaded"] == loads * 2 * counts["tile"]["elements"]
        assert 10 < counts["an_element"] < 60


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="Liger is not here")
@pytest.mark.full
def test_liger():
    script = """
import json
from bert_fast.inspect import peers, row
print(json.dumps(row(peers.liger(90))))
"""
    counts = json_of(compiling("-c", script))["counts"]
    assert counts["over_least"] == pytest.approx(1, abs=0.01)
    assert 20 < counts["an_element"] < 60
