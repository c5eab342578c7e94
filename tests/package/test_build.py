"""The build: rules of the layout, messages, import time."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT, sources

from benchmarks.readme import rewritten


def test_layout_rules():
    """No torch header in csrc, Python in bindings.cpp alone, imports one way."""
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", text), path
        if path.name != "bindings.cpp":
            assert not re.search(r"#include\s*[<\"](Python\.h|pybind11)", text), path
    assert "import torch" not in (ROOT / "setup.py").read_text()
    order = [
        "_C",
        "files",
        "reference",
        "backends",
        "cpu",
        "cuda",
        "ops",
        "packing",
        "workspace",
        "blocks",
        "model",
        "checkpoint",
        "heads",
        "nn",
        "hugging_face",
    ]
    order += ["text", "compare", "cli"]
    late = {("model", "checkpoint")}  # from_pretrained imports it when called
    for i, name in enumerate(order):
        path = ROOT / "bert_fast" / f"{name}.py"
        if not path.exists():
            continue
        for later in order[i + 1 :]:
            if (name, later) not in late:
                pattern = rf"from bert_fast\.{later} import|from bert_fast import .*\b{later}\b"
                assert not re.search(pattern, path.read_text()), f"{name} imports {later}"
    assert len((ROOT / "bert_fast/models/bert.py").read_text().splitlines()) < 400


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_pool():
    """The extension uses the OpenMP that torch brought: a second one would oversubscribe cores."""
    code = (
        "import torch, bert_fast; bert_fast.gelu(torch.zeros(99, 999)); "
        "print({l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.rpartition('/')[2]})"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pools = eval(said.stdout)
    assert len(pools) == 1, pools
    assert "torch" in next(iter(pools))


def test_readme_says_what_was_measured():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == rewritten(readme), "run python -m benchmarks.readme"


def run_setup(tmp_path, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")],
        cwd=sources(tmp_path / "copy"), env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_build_errors_are_one_sentence(tmp_path):
    (tmp_path / "copy").mkdir()
    nothing = tmp_path / "bin"
    nothing.mkdir()
    answer = run_setup(tmp_path, PATH=str(nothing), CXX="")
    assert answer.returncode != 0
    assert answer.stderr.strip().startswith("bert_fast: no C++ compiler")
    compiler = Path(shutil.which("g++"))
    (nothing / "g++").symlink_to(compiler)
    answer = run_setup(tmp_path, PATH=str(nothing), BERT_FAST_CUDA="on", CUDA_HOME=str(nothing))
    assert answer.returncode != 0
    assert "BERT_FAST_CUDA=on, but nvcc" in answer.stderr
    assert "Traceback" not in answer.stderr
    answer = run_setup(tmp_path, BERT_FAST_CUDA="maybe")
    assert "BERT_FAST_CUDA must be auto, on or off" in answer.stderr


def test_import_time():
    """import bert_fast adds at most 150 ms to import torch: the best of three processes."""
    code = (
        "import torch, time; begin = time.perf_counter(); import bert_fast; "
        "print(time.perf_counter() - begin)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) <= 0.150, times
