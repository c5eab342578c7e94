"""Faults planted in the Triton kernels, each alone: the tests that run in Triton's interpreter must
notice."""

import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import some_of

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)

# file, what is there, what a tired hand might write, and the tests that must notice
MUTANTS = [
    ("attention_tiles", "seen = (col < k_length)[None, :]", "seen = (col < k_length + 1)[None, :]"),
    ("attention_tiles", "total *= shrink", "total *= 1.0"),
    ("attention_tiles", "weights = tl.exp2(scores * factor - new_top[:, None])",
     "weights = tl.exp2(scores * factor - new_top[:, None] * factor)"),
    ("attention_tiles", "left += partial_sums(weights, BLOCK_M, BLOCK_N, PARTS)", "left = norm"),
    ("attention", "tl.full((BLOCK_M,), LOWEST, tl.float32)",
     'tl.full((BLOCK_M,), float("-inf"), tl.float32)'),
    ("attention", "tl.sum(left, 1) if DROPOUT else norm", "norm"),
    ("attention", "        top += shift_of_k", "        top += 0.0 * shift_of_k"),
    ("attention", "queries, scale = -queries, -scale", "queries, scale = queries, -scale"),
    ("attention_tiles", "whole = tl.maximum(0, tl.minimum(whole, first + 1 + k_length - q_length))",
     "whole = tl.maximum(0, tl.minimum(whole, first + BLOCK_M + k_length - q_length))"),
    ("attention_tiles", "return last, whole // BLOCK_N * BLOCK_N",
     "return last, (whole + BLOCK_N - 1) // BLOCK_N * BLOCK_N"),
    ("attention_tiles", "c = (c & -15) | (c & 6) << 1 | (c & 8) >> 2", "c = c ^ 2"),
    ("attention_tiles", "norm = norm * shrink + partial_sums", "norm = norm + partial_sums"),
    ("attention_tiles", "at += row.to(tl.int64)[:, None] * stride + d[None, :]",
     "at += row.to(tl.int64)[:, None] * HEAD_DIM + d[None, :]"),
    ("attention_tiles", "return tl.cast(stride, tl.int64) * ROWS",
     "return tl.cast(stride, tl.int64) * (ROWS - 1)"),
    ("attention", "            table_at += BLOCK_N", "            table_at += 1"),
    ("attention", "work_at = work + hidden", "work_at = work"),
    ("attention", "        work_at += BLOCK_M", "        work_at += BLOCK_M - 1"),
    ("attention", "rows_from(q, q_begin + hidden,", "rows_from(q, q_begin,"),
    ("attention", "table_from(table, hidden, first,", "table_from(table, 0, first,"),
    ("attention", "table_at += rows_on(table_cols, BLOCK_M)", "table_at += BLOCK_M"),
    ("attention_short", "values_at += rows_on(v_stride, BLOCK_N)", "values_at += BLOCK_N"),
    ("attention_tiles", "col[None, :] <= row[:, None] + (k_length - q_length)",
     "col[None, :] <= row[:, None]"),
    ("attention_tiles", "dropped = weights * z", "dropped = weights * keep_scale"),
    ("attention_tiles", "dweights = dweights * z", "dweights = dweights * keep_scale"),
    ("attention_tiles", "dweights += extra[:, None]", "dweights += 0.0 * extra[:, None]"),
    ("attention_tiles", "draw = begin // 32 * 4 +", "draw = begin // 32 * 8 +"),
    ("attention_tiles", "bits = bits >> (begin // COLS % 2 * 4)", "bits = bits >> 0"),
    ("attention_tiles", "bits |= (words[i] << 16 >= cut", "bits |= (words[i] << 15 >= cut"),
    ("attention_tiles", 'log = tl.load(at, inside, float("inf"))',
     'log = tl.load(at, inside, float("-inf"))'),
    ("common", "tl.join(words << 16, words)", "tl.join(words, words << 16)"),
    ("attention_tiles", "return dropped, weights * (dweights - center[:, None])",
     "return dropped, weights * dweights"),
    ("attention_tiles", "            center -= extra", "            center -= 0.0 * extra"),
    ("attention_tiles", "        log -= row_shift(", "        log -= 0.0 * row_shift("),
    ("attention", "whole = tl.maximum(whole, hidden)", "whole = tl.maximum(whole, start)"),
    ("attention", "begin = tl.where(at < hidden, at, at + whole - hidden)", "begin = at"),
    ("attention", "hidden = (tl.maximum(0, ahead + BLOCK_N - 1) + BLOCK_M - 1)",
     "hidden = (tl.maximum(0, ahead) + BLOCK_M - 1)"),
    ("attention_short", "_clear(dk, k_begin, total_k,", "_clear(dk, k_begin + 1, total_k,"),
    ("attention_short", "total = dot(dscores, keys, total, PRECISION)",
     "total = dot(dscores, keys, None, PRECISION)"),
    ("attention_short", "for begin in range(0, k_length, BLOCK_N):",
     "for begin in range(0, k_length - BLOCK_N, BLOCK_N):"),
    ("attention_tiles", "if tl.load(cu + middle) // BLOCK + middle <= tile:",
     "if tl.load(cu + middle) // BLOCK + middle < tile:"),
    ("attention_tiles", "at += row[:, None] * table_cols + key_order(COLS, MIXED)[None, :]",
     "at += row[:, None] + key_order(COLS, MIXED)[None, :] * table_cols"),
    ("attention_tiles", "tile.to(tl.float32) * (LOG2E / factor)", "tile.to(tl.float32) * LOG2E"),
    ("attention_tiles", "tl.where(tl.abs(scale) < 1e-30, 1e-30, scale)", "scale"),
    ("attention_tiles", "(tl.program_id(1).to(tl.int64) * table_rows + first) * table_cols",
     "(tl.program_id(1).to(tl.int64) + first) * table_cols"),
    ("attention_tiles", "table = F.pad(table, (0, missing))", "table = F.pad(table, (missing, 0))"),
    ("attention_table", "range(tl.program_id(2), batch,", "range(tl.program_id(2), batch - 1,"),
    ("attention_table", "begin < first + BLOCK_M + k_length - q_length",
     "begin < first + k_length - q_length"),
    ("attention_table", "meets = (first < q_length) & (begin < k_length)",
     "meets = (first < k_length) & (begin < q_length)"),
    ("attention_table", "            total += dscores", "            total = dscores"),
    ("attention_table", "at = dtable + ((chunk * heads + head) * table_rows",
     "at = dtable + (head * table_rows"),
    ("attention_table", "DROPOUT and HAS_BIAS, True, BLOCK_M)", "False, True, BLOCK_M)"),
    ("attention", "HAS_BIAS, MASKED, BLOCK_M)", "HAS_BIAS, False, BLOCK_M)"),
    ("attention_table", "col = begin + key_order(BLOCK_N, DROPOUT)",
     "col = begin + key_order(BLOCK_N, False)"),
    ("layer_norm", "deviation = tl.where(inside, s - center[:, None], 0.0)",
     "deviation = s - center[:, None]"),
    ("layer_norm", "s = tl.where(keep, s * keep_scale, 0.0)", "s = tl.where(keep, s, 0.0)"),
    ("layer_norm", "ds = tl.where(keep, ds * keep_scale, 0.0)", "ds = ds * 1.0"),
    ("layer_norm", "mean_g_xhat = tl.sum(g * xhat, 1)", "mean_g_xhat = tl.sum(g, 1)"),
    ("layer_norm", "range(program * ROWS, rows, programs * ROWS)",
     "range(program * ROWS, rows - 1, programs * ROWS)"),
    ("gelu", "range(tl.program_id(1) * ROWS, rows,", "range(tl.program_id(1) * ROWS, rows - ROWS,"),
    ("gelu", "tl.program_id(0) % columns * BLOCK", "tl.program_id(0) % columns"),
    ("gelu", "0.0059254551", "0.0058254551"),
    ("gelu", "(ROOT * ABOVE - v * ABOVE) * power(v, SLOPE_FP16)",
     "(0.7517 * ABOVE - v * ABOVE) * power(v, SLOPE_FP16)"),
    ("gelu", "u * DENSITY * tl.exp(-0.5 * u * u)", "DENSITY * tl.exp(-0.5 * u * u)"),
    ("linear", "first = number // per_group * GROUP", "first = number // per_group"),
    ("linear", "(r < rows)[:, None] & (c < cols)[None, :], 0.0)",
     "(r < rows)[:, None] & (c < cols + 1)[None, :], 0.0)"),
    ("linear", "u, at = halves[i], col + i * HALF", "u, at = halves[i], col"),
    ("embedding", "s += _row_of(position, position_ids,", "s += _row_of(position, input_ids,"),
    ("embedding", "table + i[:, None] * width + col", "table + i[:, None] * (width - 1) + col"),
    ("common", "inside = (row < count)", "inside = (row < count - 1)"),
    ("common", "tl.store(out1 + col", "tl.store(out0 + col"),
    ("common", "range(tl.program_id(1) * ROWS, rows,", "range(tl.program_id(1) * ROWS, rows - 1,"),
    ("common", "col = (block - begin) % columns * BLOCK", "col = block % columns * BLOCK"),
    ("common", "kind + number.to(tl.int64) * count", "kind + number.to(tl.int64)"),
]  # fmt: skip
NOTICE = {
    "attention": ["backends/test_position_kernels", "ops/test_attention"],  # the small one first
    "attention_tiles": ["backends/test_position_kernels", "ops/test_attention"],
    "attention_short": ["ops/test_attention"], "linear": ["ops/test_linear_gelu"],
    "attention_table": ["backends/test_position_kernels"], "layer_norm": ["ops/test_layer_norm"],
    "gelu": ["ops/test_gelu"], "embedding": ["ops/test_embedding"],
    "common": ["ops/test_gelu", "ops/test_layer_norm", "models/test_trained_layers"],
}  # fmt: skip


def survives(folder, file, right, wrong):
    """Whether the suite's Triton tests pass on a copy of the project with one fault."""
    for name in ("bert_fast", "kernels", "csrc", "tests", "benchmarks", "pyproject.toml"):
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__", "results")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore, symlinks=True)
        else:
            shutil.copy(source, folder / name)
    link = folder / "bert_fast" / "kernels"  # else an editable install's finder finds the original
    if not link.exists():
        link.symlink_to("../kernels")
    path = folder / "kernels" / f"{file}.py"
    text = path.read_text(encoding="utf-8")
    assert right in text, f"{file}.py no longer has {right!r}: plant it anew"
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-k", "triton", "-m", "not full and not gpu",
         *(f"tests/{name}.py" for name in NOTICE[file])],
        cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )  # fmt: skip
    shutil.rmtree(folder)
    assert answer.returncode in (0, 1), answer.stdout[-3000:]  # 1: tests ran, and some failed
    return answer.returncode == 0


@pytest.mark.full
def test_planted_faults_are_caught(tmp_path):
    """Each fault alone; the suite's Triton tests must fail on it."""

    def some(number):
        folder = tmp_path / str(number)
        folder.mkdir()
        return survives(folder, *MUTANTS[number])

    (tmp_path / "none").mkdir()  # what reports faults everywhere reports nothing
    assert survives(tmp_path / "none", "gelu", "tl.exp", "tl.exp")
    numbers = some_of(range(len(MUTANTS)))
    with ThreadPoolExecutor(2) as pool:
        alive = list(pool.map(some, numbers))
    assert not [MUTANTS[i] for i, lives in zip(numbers, alive, strict=True) if lives]
