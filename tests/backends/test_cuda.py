"""The CUDA kernels without a GPU: what their host build must notice, faults planted in them, and
what nvcc makes of them for real chips.

That they are right is tested where every backend's are: `cuda-host` and `cuda-gpu` in
test_attention.py and its neighbours.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bars
import cuda_host
import pytest
import test_fused_backward
import torch
from conftest import NO_CUDA_HOST, assert_within, cu_seqlens, some_of

import bert_fast
from bert_fast import _C, ops
from bert_fast.inspect.sass import OPCODE

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
needs_host = pytest.mark.skipif(bool(NO_CUDA_HOST), reason=NO_CUDA_HOST or "it is here")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


# ---- the host build ----


def gradients(dtype, lengths, heads, head_dim, seed=0, backend="cuda", **options):
    torch.manual_seed(seed)
    qkv, bias = torch.randn(sum(lengths), 3, heads, head_dim), torch.randn(3, heads, head_dim)
    dout = torch.randn(sum(lengths), heads, head_dim)
    exact = torch.float64 if backend == "truth" else dtype
    qkv = qkv.to(dtype).to(exact).requires_grad_()
    out = ops.attention_qkv(
        qkv, cu_seqlens(lengths), bias=bias.to(dtype).to(exact), seed=5,
        backend="eager" if backend == "truth" else backend, **options,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out, qkv, dout.to(dtype).to(exact))
    return out.detach(), grad


@needs_host
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 80])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.2, "causal": True}], ids=["", "dropout"])
def test_attention_as_turing_runs_it(monkeypatch, dtype, head_dim, options):
    """Compute capability 7.5: no bf16 in its tensor cores, 64 KiB of shared memory, so of wide
    heads one tile of keys at a time, for the sake of a second CTA."""
    monkeypatch.setenv("BERT_FAST_HOST_CAPABILITY", "75")
    found = [
        gradients(dtype, [200, 3, 33], 2, head_dim, backend=name, **options)
        for name in ("cuda", "eager", "truth")
    ]
    assert_within(*found, name="out, dqkv")


@needs_host
@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
@pytest.mark.parametrize("head_dim", [64, 200])
def test_any_softmax_scale(scale, head_dim):
    """Negative, zero, and so large that a row's maximum climbs from one tile to the next."""
    options = {"softmax_scale": scale, "dropout_p": 0.1}
    found = [
        gradients(torch.bfloat16, [150, 20], 1, head_dim, backend=name, **options)
        for name in ("cuda", "eager", "truth")
    ]
    assert_within(*found, name="out, dqkv")


@needs_host
def test_what_turing_has_no_room_for_is_an_error(monkeypatch):
    monkeypatch.setenv("BERT_FAST_HOST_CAPABILITY", "75")
    with pytest.raises(RuntimeError, match=r"cuda_attention_backward \(20 and 20 tokens, 1 heads "
                       r"of 200\) on cuda:0: this head_dim needs more shared memory"):  # fmt: skip
        gradients(torch.float16, [20], 1, 200)


@needs_host
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_schedule_gives_the_same_bits(monkeypatch, dtype):
    """Of warps and of blocks: a missing barrier, or a sum whose order is free, would show."""

    def run():
        x, residual = torch.randn(2, 37, 80, generator=torch.Generator().manual_seed(3)).to(dtype)
        x.requires_grad_()
        weight = torch.linspace(0.5, 2, 80, requires_grad=True)
        wide = torch.randn(5, 1100, generator=torch.Generator().manual_seed(4)).to(dtype)
        normed = ops.layer_norm(
            x, weight, weight, residual=residual, linear_bias=weight, dropout_p=0.1, seed=1,
            backend="cuda",
        )  # fmt: skip
        out = ops.gelu(normed, weight, backend="cuda")
        wider = ops.layer_norm(wide, wide[0].float(), wide[1].float(), backend="cuda")
        return [
            *gradients(dtype, [150, 70], 1, 64, dropout_p=0.1), out.detach(), wider,
            *gradients(dtype, [20, 9, 0, 32, 17], 2, 64, dropout_p=0.1),
            *torch.autograd.grad(out.float().square().sum(), [x, weight]),
        ]  # fmt: skip

    first = run()
    for seed in range(1, 5):
        monkeypatch.setenv("BERT_FAST_HOST_SEED", str(seed))
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@needs_host
def test_every_schedule_of_programs_sums_all_rows(monkeypatch):
    """As many programs as a GPU has, of which some have no rows, and few."""
    from bert_fast.backends import cuda

    x, dout = torch.randn(2, 150, 24)
    bias = torch.zeros(24, requires_grad=True)
    for programs in (1, 3, 16, 37, 300):
        monkeypatch.setattr(cuda, "_programs", lambda x, at_a_time, n=programs: n)
        (found,) = torch.autograd.grad(ops.gelu(x, bias, backend="cuda"), bias, dout)
        (wanted,) = torch.autograd.grad(torch.nn.functional.gelu(x + bias), bias, dout)
        torch.testing.assert_close(found, wanted)


@needs_host
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_on_the_other_side(dtype):
    """Zeros, whatever was on its way to shared memory; over several schedules."""
    for _ in range(8):
        for lengths_q, lengths_k in (([150, 0], [0, 0]), ([40], [0]), ([0, 0], [0, 70])):
            q, k = (
                torch.randn(sum(lengths), 2, 64, dtype=dtype, requires_grad=True)
                for lengths in (lengths_q, lengths_k)
            )
            out = ops.attention(
                q, k, k, cu_seqlens(lengths_q), cu_seqlens(lengths_k), backend="cuda"
            )
            dq, dk = torch.autograd.grad(out, [q, k], torch.randn_like(out))
            assert not any(t.ne(0).any() for t in (out, dq, dk))


SANITIZED = """
import os, sys
sys.path[:0] = ["tests", "tests/backends"]
import torch, test_cuda
from bert_fast import ops
for dtype in (torch.bfloat16, torch.float32):
    for lengths, head_dim in (([65, 1, 0, 63], 24), ([130], 17), ([2], 128), ([31, 1, 0, 16], 64),
                              ([128, 33], 64)):
        test_cuda.gradients(dtype, lengths, 2, head_dim, dropout_p=0.1, causal=True)
    os.environ["BERT_FAST_HOST_MULTIPROCESSORS"] = "1"  # dq is summed in the scratch
    test_cuda.gradients(dtype, [129, 0, 150], 2, 40, dropout_p=0.1, causal=True)
    del os.environ["BERT_FAST_HOST_MULTIPROCESSORS"]
    for width in (77, 80, 1032):
        x = torch.randn(11, width, dtype=dtype, requires_grad=True)
        v = torch.randn(width, requires_grad=True)
        y = ops.layer_norm(x, v, v, residual=x, dropout_p=0.1, backend="cuda")
        ops.gelu(y, v, backend="cuda").sum().backward()
print("done")
"""


@needs_host
@pytest.mark.full
def test_no_access_out_of_bounds(tmp_path):
    """Under AddressSanitizer: every tensor and every block's shared memory ends in a red zone."""
    module = cuda_host.build(
        ROOT / "build" / "cuda_host_asan", flags=("-O1", "-g", "-fsanitize=address")
    )
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True,
                       check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]  # fmt: skip
    answer = subprocess.run(
        [sys.executable, "-c", SANITIZED], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {
            "LD_PRELOAD": " ".join(libraries), "BERT_FAST_CUDA_HOST": str(module),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        },
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert answer.stdout.endswith("done\n")


# ---- planted faults ----

# file, what is there, what a tired hand might write
FAULTS = [
    ("attention.cu", "first + row < length", "first + row <= length"),
    ("attention.cu", "norm = norm * shrink + side_sum(weight)", "norm = norm + side_sum(weight)"),
    ("attention.cu", "total[j] *= shrink", "total[j] *= 1.0f"),
    ("attention.cu", "(dweight - center)", "dweight"),
    ("attention.cu", "weight *= keep;", ""),
    ("attention.h", "column < k_length &&", "column <= k_length &&"),
    ("attention.h", "column <= row + k_length - q_length", "column <= row"),
    ("attention.h", "score += bias * kLog2e", "score += bias"),
    ("attention.h", "return bias != -INFINITY", "return true"),
    ("attention.h", "(head * table.rows + row) * table.columns", "(head + row) * table.columns"),
    ("attention.cu", "first_column >= first_row + kSide + k_length - q_length",
     "first_column >= first_row + k_length - q_length"),
    ("attention.cu", "if (!seen(first_row, first_column, q_length, k_length, false)) continue;",
     "if (!seen(first_row, first_column, k_length, q_length, false)) continue;"),
    ("attention.cu", "total += exp2_fast(score - log2_of(a.lse[at]))",
     "total = exp2_fast(score - a.lse[at] * kLog2e)"),
    ("attention.cu", "factor(drop, row, column, head, sequence);", "1.0f;"),
    ("attention.cu", "(head * table.rows + row) * table.columns + column] = total",
     "(head + row) * table.columns + column] = total"),
    ("attention.h", "row * t.token + head * t.head", "row * t.head + head * t.token"),
    ("attention.h", "/ rows + at <= tile", "/ rows + at < tile"),
    ("attention_mma.h", "row = first + static_cast<int>(team_thread",
     "row = static_cast<int>(team_thread"),
    ("attention_mma.h", "static_cast<int>(i * kStep) < left);", "true);"),
    ("attention_mma.h", "(c ^ twist(row)) * 8", "(c + twist(row)) * 8"),
    ("attention_mma.h", "return {row + lane % 16, lane / 16};", "return {row + lane % 16, 0};"),
    ("attention_mma.h", "j / 2 * 4 + j % 2 + odd * 2", "j + odd * 8"),
    ("attention_mma.h", "key_of(lane % 8, lane / 16), lane / 8 % 2",
     "key_of(lane % 8, lane / 8 % 2), lane / 16"),
    ("attention_mma.h", "columns.at(right, (from + k) * 16, 2 * n)",
     "columns.at(right, k * 16, 2 * n)"),
    ("attention_mma.h", "n / 2 * 16 + n % 2 * 2 + j >= left", "n / 2 * 16 + n % 2 * 2 + j > left"),
    ("attention_mma.h", "b.query + down + 1 + b.k_length - b.q_length", "b.query + down + 1"),
    ("attention_mma.h", "(to_float(pack.values[j]) + add[j]) * factor", "to_float(pack.values[j])"),
    ("attention_mma.h", "kMayHaveOneTile && wide & kOneTile", "false"),
    ("attention_mma.cu", "(2 * stage + 1) * kKeys", "(stage + 1) * kKeys"),
    ("attention_mma.cu", "> kSlack", "> 1000 * kSlack"),
    ("attention_mma.cu", "s.norm[r] *= shrink", "s.norm[r] *= 1.0f"),
    ("attention_mma.cu", "s.total[r / 2][n][r % 2 * 2 + 1] *= shrink",
     "s.total[r / 2][n][r % 2 * 2 + 1] *= 1.0f"),
    ("attention_mma.cu", "first_row + 1 + ahead", "first_row + kMine + ahead"),
    ("attention_mma.h", "scale < 0 ? -1.0f", "scale < 0 ? 1.0f"),
    ("attention_mma.cu", "if (kDrop) share[i] *= drop.scale", ""),
    ("attention_mma.cu", "bias[2 * part + d] * kept", "bias[2 * part + d]"),
    ("attention_mma_backward.cu", "drops ? start : start - delta", "start - delta"),
    ("attention_mma_backward.cu", "(shifted * a.scale - lse) * kLog2e", "-lse * kLog2e"),
    ("attention_mma_backward.h", "shuffle_xor(drawn, 12)", "shuffle_xor(drawn, 8)"),
    ("attention_mma_backward.h", "kept[j] = of[j] >> own", "kept[j] = of[j]"),
    ("attention_mma_backward.h", "kept[j] >> (n * 4 + half * 4)", "kept[j] >> (n * 4 + half)"),
    ("attention_mma_backward.cu", "whole = a.causal ? from + kApart + 7",
     "whole = a.causal ? from"),
    ("attention_mma.h", "to += (kApart - 8) * s.tensor.token", "to += 0 * s.tensor.token"),
    ("attention_mma.h", "kTiles < 4 ? b.key >> 4 & 1 : j / 4", "j / 4"),
    ("attention_mma.cu", "draw_of(b.key) + n", "draw_of(b.key)"),
    ("attention.h", "key / 32 * 4 + key % 16 / 4", "key / 32 * 4 + key % 32 / 8"),
    ("attention.cu", "column >> 4 & 1", "0"),
    ("attention_mma_backward.cu", "keys[0] - ahead, keys[1] - ahead", "keys[0], keys[1]"),
    ("attention_mma_backward.cu", "first + offset + kTail<kQueries> <= from",
     "first + offset <= from"),
    ("layer_norm.cu", "if (column >= width) continue;\n    P pack;", "P pack;"),
    ("layer_norm.cu", "vector_of(a.bias, low, kBias)", "vector_of(a.bias, low, kWeight)"),
    ("layer_norm.cu", "(low & which) != 0", "low != 0"),
    ("layer_norm.cu", "xhat * product", "xhat * sum"),
    ("layer_norm.cu", "column / 8, static_cast", "column / kCount, static_cast"),
    ("layer_norm.cu", "at & 1, drop", "0, drop"),
    ("layer_norm.cu", "add ? slots[i * kWarp] + mine[i] : mine[i]", "mine[i]"),
    ("gelu.cu", "blockIdx.x - block * columns", "blockIdx.x"),
    ("gelu.cu", "static_cast<int64_t>(block) * kForwardRows", "static_cast<int64_t>(block)"),
    ("sums.cu", "i < kind.programs; i += kSumGroups", "i < kind.programs - 1; i += kSumGroups"),
    ("sums.cu", "g < kSumGroups; ++g", "g < kSumGroups - 1; ++g"),
    ("sums.cu", "    block -= before;\n", ""),
    ("sums.cu", "block % blocks * kSumColumns + place", "place"),
    ("sums.cu", "number * kind.programs * kind.width", "number * kind.width"),
    ("gelu.cu", "0.0059254551f", "0.0058254551f"),
    ("gelu.cu", "kRoot = 0.75179152f", "kRoot = 0.7517f"),
    *test_fused_backward.FAULTS,
]  # fmt: skip
REMOVABLE = r"((warp|team)_)?barrier(<\w+>)?\(\)|copy_async_wait<\d>\(\)"


def removals():
    """Each barrier and each wait for copies, taken out alone."""
    for file in ("attention.cu", "attention_mma.cu", "attention_mma_backward.cu",
                 "attention_mma_fused.cu", "layer_norm.cu", "gelu.cu", "sums.cu"):  # fmt: skip
        text = (ROOT / "csrc" / "cuda" / file).read_text(encoding="utf-8")
        for found in re.finditer(rf"^.*\b({REMOVABLE});.*$", text, re.M):
            changed = re.sub(REMOVABLE, "", found[0], count=1)
            yield file, found.span(), changed, found[0].strip()


def planted():
    """(file, text with one fault, what it is)"""
    for file, span, line, was in removals():
        text = (ROOT / "csrc" / "cuda" / file).read_text(encoding="utf-8")
        number = text[: span[0]].count("\n") + 1
        yield file, text[: span[0]] + line + text[span[1] :], f"{file}:{number}: no {was}"
    for file, right, wrong in FAULTS:
        text = (ROOT / "csrc" / "cuda" / file).read_text(encoding="utf-8")
        assert right in text, f"{file} no longer has {right!r}: plant it anew"
        yield file, text.replace(right, wrong), f"{file}: {wrong} for {right}"


def survives(number, file, text, folder):
    """Whether the suite's tests of the host build pass on a faulty copy."""
    csrc, build = folder / f"csrc-{number}", folder / f"build-{number}"
    shutil.copytree(ROOT / "csrc", csrc)
    shutil.copytree(ROOT / "build" / "cuda_host", build)
    for made in build.iterdir():
        made.touch()
    (csrc / "cuda" / file).write_text(text, encoding="utf-8")
    module = cuda_host.build(build, csrc)
    op = "attention" if file.startswith("attention") else file.partition(".")[0]
    of_op = "models/test_trained_layers" if op == "sums" else f"ops/test_{op}"
    tests = [f"tests/{of_op}.py", __file__]
    if op == "attention":  # first: small, and by the same kernels
        small = ["tests/backends/test_position_kernels.py", "tests/backends/test_fused_backward.py"]
        tests = [*(small[::-1] if "fused" in file else small), *tests]
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-k",
         "cuda-host or cuda-cpu or schedule or turing or other_side or fused",
         "-m", "not full and not gpu", *tests],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"BERT_FAST_CUDA_HOST": str(module)},
    )  # fmt: skip
    shutil.rmtree(csrc)
    shutil.rmtree(build)
    # 1: tests ran, and some failed; below 0: they crashed. Anything else ran no test.
    assert answer.returncode <= 1, answer.stdout[-3000:]
    return answer.returncode == 0


@needs_host
@pytest.mark.full
def test_planted_faults_are_caught(tmp_path, capsys):
    """Of those that are tried at least 95%, and every survivor is named."""
    faults = some_of(planted())
    file = "gelu.cu"  # as it stands: what reports faults everywhere reports nothing
    assert survives("none", file, (ROOT / "csrc/cuda" / file).read_text("utf-8"), tmp_path)
    with ThreadPoolExecutor(2) as pool:
        alive = list(pool.map(lambda i: survives(i, *faults[i][:2], tmp_path), range(len(faults))))
    survivors = [what for (_, _, what), lives in zip(faults, alive, strict=True) if lives]
    with capsys.disabled():
        print(f"\n{len(faults)} faults planted, {len(survivors)} not noticed: {survivors}")
    assert len(survivors) <= 0.05 * len(faults), survivors


# ---- as nvcc compiles them ----


@needs_nvcc
@pytest.mark.parametrize(
    "arch",
    ["90a", *(pytest.param(a, marks=pytest.mark.full) for a in ["75", "80", "120"])],
)
@pytest.mark.parametrize(
    "file",
    [
        "attention", "gelu", "layer_norm", "sums",
        *(pytest.param(f"attention_{f}", marks=pytest.mark.full)
          for f in ["mma", "mma_backward", "mma_fused"]),
    ],
)  # fmt: skip
def test_compiles_without_spills(file, arch, tmp_path):
    """No register spilled, 16-byte accesses to global memory, tensor-core products; no more
    instructions an element than there were."""
    cubin = tmp_path / "kernel.cubin"
    report = subprocess.run(
        [NVCC, "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin",
         "-Xptxas=-v", "-o", cubin, ROOT / "csrc" / "cuda" / f"{file}.cu"],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    assert len(spills) >= 2 * (3 if file == "sums" else 9)
    assert not any(spills), report
    if file == "attention_mma_fused" and arch == "75":
        return  # it is for later chips
    triton = importlib.util.find_spec("triton")
    tool = shutil.which("cuobjdump") or (
        triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    )
    if not tool:
        pytest.skip("no cuobjdump, of CUDA's or of Triton's, to read instructions with")
    sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    if file in ("gelu", "layer_norm") and arch == "90a":
        check_lean(sass)
    if arch in ("80", "90a") and triton and "release 13.0" in version_of(NVCC):
        bars.check_cuda(file, cubin, arch)
    if file.startswith("attention_mma"):
        assert sass.count("HMMA") > 1000
        assert arch == "75" or "LDGSTS" in sass  # cp.async
        assert "LDSM" in sass
    if file not in ("attention", "sums"):
        wide = (
            "LDGSTS.E.BYPASS.128"
            if file.startswith("attention_mma") and arch != "75"
            else "LDG.E.128"
        )
        assert wide.removesuffix(".128") in sass
        assert ".128" in sass
        assert "STG.E.128" in sass


def version_of(nvcc):
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def check_lean(sass):
    """Of bf16's kernels: few instructions an element in exact GELU (a thread of forward has 64,
    one of backward 32 at a time), no narrow loads of layer-norm's parameters."""
    kernels = [part.partition("\n") for part in sass.split("Function : ")[1:]]
    code = {name: OPCODE.findall(body) for name, _, body in kernels}
    gelu = {name: len(ops) for name, ops in code.items() if "bfloat16Li8ELNS_4GeluE0" in name}
    for name, count in gelu.items():
        assert count <= (20 * 64 if "7forward" in name else 27 * 32), name
    norm = [ops for name, ops in code.items() if "7forwardI13__nv_bfloat16Li8ELi32" in name]
    assert len(gelu) == 2 or len(norm) == 1
    assert not any(op in ("LDG.E", "LDG.E.U16") for ops in norm for op in ops)


@pytest.mark.skipif(_C.cuda_archs is None, reason="needs an extension built with nvcc")
def test_inspect_reads_the_extension():
    from bert_fast.inspect import CHIPS, cuda_kernels

    chips = [chip for chip in CHIPS if str(chip) in _C.cuda_archs]
    found = list(cuda_kernels(chips[:1]))
    names = {(kernel.kernel, kernel.work) for kernel in found}
    assert ("cuda/attention_mma.cu", "forward_kernel<bf16, 64, 64, 2, 128, false>") in names
    assert ("cuda/gelu.cu", "backward<fp16, 8, erf>") in names
    assert not [kernel for kernel in found if kernel.faults()]


@pytest.mark.full
@pytest.mark.skipif(_C.cuda_archs is None, reason="needs an extension built with nvcc")
def test_nothing_spills_on_any_chip_of_the_extension():
    """What was built is read: compiling it again for each chip would take many minutes."""
    from bert_fast.inspect import CHIPS, cuda_kernels

    chips = [chip for chip in CHIPS if str(chip) in _C.cuda_archs]
    found = list(cuda_kernels(chips))
    assert {kernel.chip for kernel in found} == set(chips)
    assert not [kernel for kernel in found if kernel.faults()]


@needs_host
def test_what_it_does_not_take_is_said():
    x = torch.randn(2, 8200)
    with pytest.raises(bert_fast.BackendUnavailableError, match="up to 8192, not 8200"):
        ops.layer_norm(x, x[0], x[0], backend="cuda")
