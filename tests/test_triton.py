"""The Triton kernels without a GPU: compiled for real chips, and faults planted in them.

That they are right is tested where every backend's are, in Triton's interpreter: `backend` in
test_attention.py and its neighbours.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import cu_seqlens

import bert_fast
from bert_fast import ops

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


def compiling(*command, cwd=ROOT):
    """Runs Python where Triton compiles: the tests' own process interprets."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=False,
        env=env | {"PYTHONPATH": str(cwd), "TRITON_DEFAULT_FP_FUSION": "1"},
    )  # fmt: skip


# Falls short: the widest heads in float32, where no tile that was tried leaves a register free.
WIDE_FLOAT32 = re.compile(r"attention, .* heads of 256, .*float32")


def inspected(tmp_path, *options):
    out = tmp_path / "inspected.json"
    answer = compiling("-m", "bert_fast.cli", "inspect", "--json", str(out), *options)
    assert out.is_file(), answer.stdout[-4000:] + answer.stderr[-2000:]
    return json.loads(out.read_text())


def check(rows):
    """No spill, no more shared memory than the chip has, tensor cores, 16-byte loads."""
    short = [row for row in rows if WIDE_FLOAT32.match(row["work"])]
    assert all(row["spills"] <= 64 for row in short)
    rows = [row for row in rows if row not in short]
    assert not [row for row in rows if row["faults"]]
    kernels = {row["kernel"] for row in rows}
    assert {"attention.forward", "attention.backward_q", "attention.backward_kv"} <= kernels
    assert {"layer_norm.forward", "layer_norm.backward", "gelu.forward", "gelu.backward"} <= kernels
    assert all(row["spills"] == 0 and row["widest_load"] == 128 for row in rows)


def test_main_variants_compile_for_two_chips(tmp_path):
    rows = inspected(tmp_path, "--chips", "80", "90")
    check(rows)
    found = {(row["chip"], row["products"]) for row in rows if row["kernel"] == "attention.forward"}
    assert found == {(80, "HMMA"), (90, "HGMMA")}


@pytest.mark.full
def test_all_variants_compile_for_every_chip(tmp_path):
    def some(chips):
        folder = tmp_path / chips[0]
        folder.mkdir()
        return inspected(folder, "--full", "--chips", *chips)

    with ThreadPoolExecutor() as pool:
        for rows in pool.map(some, [("80", "90", "120"), ("89", "100")]):
            check(rows)


COUNTED = """
import itertools, torch
from bert_fast import inspect
from bert_fast.kernels import attention_forward, attention_backward, gelu_forward, gelu_backward
from bert_fast.kernels import layer_norm_forward, layer_norm_backward

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

vector, seed = meta(768, dtype=torch.float32), meta(1, dtype=torch.int64)
with inspect.recorded() as launches:
    for total in [1, 2, 15, 16, *range(17, 8000, 173)]:
        batch = total % 37 + 1
        cu, q = meta(batch + 1, dtype=torch.int32), meta(total, 3, 12, 64)
        options = (cu, cu, 512, 512, None, 0.125, False, 0.1, seed)
        out, lse = attention_forward(*q.unbind(1), *options)
        attention_backward(out, *q.unbind(1), out, lse, *options, *torch.empty_like(q).unbind(1))
        x = meta(total, 768)
        out, s, mean, rstd = layer_norm_forward(x, vector, vector, x, vector, 1e-12, 0.1, seed)
        layer_norm_backward(out, s, mean, rstd, vector, True, 0.1, seed)
        gelu_forward(x, vector, "none")
        gelu_backward(x, x, vector, "none")
names = {launch.kernel.__module__ + launch.kernel.__name__ for launch in launches}
print(len(launches), len(names), len(set(launches)))
"""


def test_nothing_recompiles_when_token_counts_change():
    answer = compiling("-c", COUNTED)
    assert answer.returncode == 0, answer.stderr
    launches, kernels, compilations = map(int, answer.stdout.split())
    assert launches >= 50 * 9
    assert kernels == 9
    assert compilations == kernels


def test_a_fault_in_the_compiled_code_would_be_seen():
    from bert_fast.inspect import Compiled

    good = Compiled("attention, bfloat16", 1, 1, "attention.forward", 90, 8, 168, 65536, 0,
                    "HGMMA", 128)  # fmt: skip
    assert good.faults() == []
    assert good.ctas == 1
    for change, said in [
        ({"spills": 8}, "8 bytes of registers spilled"),
        ({"shared": 300_000}, "300000 bytes of shared memory; the chip has 232448"),
        ({"products": ""}, "its matrix products are none, not HGMMA"),
        ({"widest_load": 32}, "its widest load is 32 bits"),
    ]:
        assert said in Compiled(**(vars(good) | change)).faults()


def test_what_it_does_not_take_is_said():
    if torch.cuda.is_available():
        pytest.skip("on a GPU these are CUDA tensors, in the op's own tests")
    qkv, cu = torch.randn(3, 3, 1, 300), cu_seqlens([3])
    with pytest.raises(bert_fast.BackendUnavailableError, match="head_dim up to 256, not 300"):
        ops.attention_qkv(qkv, cu, backend="triton")
    x = torch.randn(2, 20000)
    with pytest.raises(bert_fast.BackendUnavailableError, match="last dimension up to 16384"):
        ops.layer_norm(x, x[0], x[0], backend="triton")


# file, what is there, what a tired hand might write, and the tests that must notice
MUTANTS = [
    ("attention", "seen = (row < q_length)[:, None] & (col < k_length)[None, :]",
     "seen = (row < q_length)[:, None] & (col < k_length + 1)[None, :]"),
    ("attention", "total *= shrink[:, None]", "total *= 1.0"),
    ("attention", "norm = norm * shrink + tl.sum(weights, 1)", "norm = norm + tl.sum(weights, 1)"),
    ("attention", "x = tl.load(first + row[:, None] * stride + d",
     "x = tl.load(first + row[:, None] * heads * HEAD_DIM + d"),
    ("attention", "col[None, :] <= row[:, None] + (k_length - q_length)",
     "col[None, :] <= row[:, None]"),
    ("attention", "dropped = tl.where(keep, weights * keep_scale, 0.0)",
     "dropped = weights * keep_scale"),
    ("attention", "keep = keep_mask(tl.load(seed), cut, row, first // 4, head",
     "keep = keep_mask(tl.load(seed) + 1, cut, row, first // 4, head"),
    ("attention", "dscores = weights * (dweights - center[:, None])",
     "dscores = weights * dweights"),
    ("attention", "if tl.load(cu + middle) // BLOCK + middle <= tile:",
     "if tl.load(cu + middle) // BLOCK + middle < tile:"),
    ("layer_norm", "deviation = tl.where(inside, s - center[:, None], 0.0)",
     "deviation = s - center[:, None]"),
    ("layer_norm", "s = tl.where(keep, s * keep_scale, 0.0)", "s = tl.where(keep, s, 0.0)"),
    ("layer_norm", "ds = tl.where(keep, ds * keep_scale, 0.0)", "ds = ds * 1.0"),
    ("layer_norm", "xhat * tl.sum(g * xhat, 1)[:, None]", "xhat * tl.sum(g, 1)[:, None]"),
    ("layer_norm", "range(program * ROWS, rows, programs * ROWS)",
     "range(program * ROWS, rows - 1, programs * ROWS)"),
    ("gelu", "range(tl.program_id(1) * ROWS, rows,", "range(tl.program_id(1) * ROWS, rows - ROWS,"),
    ("gelu", "bias + at % width", "bias + at % (width - 1)"),
    ("gelu", "u * DENSITY * tl.exp(-0.5 * u * u)", "DENSITY * tl.exp(-0.5 * u * u)"),
    ("common", "for begin in range(0, count, ROWS):", "for begin in range(0, count - 1, ROWS):"),
]  # fmt: skip
NOTICE = {
    "attention": "tests/test_attention.py", "layer_norm": "tests/test_layer_norm.py",
    "gelu": "tests/test_gelu.py", "common": "tests/test_gelu.py",
}  # fmt: skip


@pytest.mark.full
def test_planted_faults_are_caught(tmp_path):
    """Each fault alone, in a copy of the project; the suite's Triton tests must fail on it."""
    copy = tmp_path / "copy"
    for name in ("bert_fast", "kernels", "tests", "benchmarks", "pyproject.toml"):
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__", "results")
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignore, symlinks=True)
        else:
            shutil.copy(source, copy / name)
    link = copy / "bert_fast" / "kernels"  # else an editable install's finder finds the original
    if not link.exists():
        link.symlink_to("../kernels")
    survivors = []
    for file, right, wrong in MUTANTS:
        path = copy / "kernels" / f"{file}.py"
        text = path.read_text(encoding="utf-8")
        assert right in text, f"{file}.py no longer has {right!r}: plant it anew"
        path.write_text(text.replace(right, wrong), encoding="utf-8")
        answer = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-k", "triton", "-m", "not full and not gpu",
             NOTICE[file]],
            cwd=copy, capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": str(copy)},
        )  # fmt: skip
        path.write_text(text, encoding="utf-8")
        if answer.returncode != 1 or " failed" not in answer.stdout:
            survivors.append((file, wrong, answer.stdout[-500:]))
    assert not survivors
