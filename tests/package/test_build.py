"""The build: messages, import time."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from checkout import ROOT, sources

from benchmarks.readme import rewritten
from bert_fast import _C, backends
from bert_fast.backends import choice


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


@pytest.fixture
def build(monkeypatch, tmp_path):
    """The functions of setup.py; PATH is an empty folder for the test's own programs."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("BERT_FAST_CUDA_ARCHS", raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def program(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *(f"echo {line}" for line in lines)]))
    path.chmod(0o755)
    return str(path)


def test_chips_are_those_that_nvcc_knows(build, monkeypatch, tmp_path):
    older = [f"compute_{n}" for n in (50, 60, 75, 80, 86, 89, 90)]
    nvcc = program(tmp_path / "nvcc", *older)
    assert build["cuda_archs"](nvcc) == ["75", "80", "86", "89", "90a"]
    newest = program(tmp_path / "newest", *older[3:], "compute_100", "compute_110", "compute_120")
    assert build["cuda_archs"](newest) == ["80", "86", "89", "90a", "100", "120"]

    program(tmp_path / "nvidia-smi", "12.0", "7.5", "9.0", "9.0")
    assert build["cuda_archs"](nvcc) == ["75", "90a"]
    program(tmp_path / "nvidia-smi", "12.0")
    assert build["cuda_archs"](nvcc) == ["80"]  # the chip then runs its PTX

    monkeypatch.setenv("BERT_FAST_CUDA_ARCHS", "90a, 80")
    assert build["cuda_archs"](nvcc) == ["80", "90a"]
    monkeypatch.setenv("BERT_FAST_CUDA_ARCHS", "80;120")
    with pytest.raises(SystemExit, match=r"nvcc does not know 120, only 50, 60, 75"):
        build["cuda_archs"](nvcc)
    monkeypatch.setenv("BERT_FAST_CUDA_ARCHS", "hopper")
    with pytest.raises(SystemExit, match="'hopper' is no chip like 80 or 90a"):
        build["cuda_archs"](nvcc)


@pytest.mark.parametrize(
    ("archs", "ptx"),
    [(["75"], [80]), (["80"], [80]), (["75", "90a"], [80, 90]), (["80", "100", "120"], [80, 120])],
)
def test_ptx_for_chips_without_code(build, archs, ptx):
    code = build["cuda_code"](archs)
    assert [int(n) for n in re.findall(r"code=compute_(\d+)", code)] == ptx
    assert re.findall(r"code=sm_(\w+)", code) == archs


def test_link_command_of_each_system(build, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "-undefined dynamic_lookup" in build["link_command"]("clang++", "", None)
    monkeypatch.setattr(sys, "platform", "linux")
    assert build["link_command"]("g++", "-fopenmp", None) == "g++ -shared -fopenmp -s"
    assert "-cudart=static" in build["link_command"]("g++", "-fopenmp", "nvcc")


def test_an_old_driver_is_said(monkeypatch):
    """One sentence from why_unavailable, before a kernel fails to load; none is not an old one."""
    monkeypatch.delenv("BERT_FAST_CUDA_HOST", raising=False)
    monkeypatch.setattr(_C, "cuda_archs", "80")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def reason(driver, built):
        monkeypatch.setattr(choice, "_modules", {})
        monkeypatch.setattr(_C, "cuda_versions", lambda: (driver, built), raising=False)
        return backends.why_unavailable("cuda")

    assert reason(11080, 13000) == (
        "the NVIDIA driver runs CUDA up to 11.8, and bert_fast was built with CUDA 13.0: "
        "update the driver, or build bert_fast with the driver's CUDA"
    )
    assert reason(12080, 13000).startswith("the NVIDIA driver runs CUDA up to 12.8")
    for driver, built in ((0, 13000), (12020, 12090), (13010, 12090)):
        assert reason(driver, built) == "torch sees no CUDA device"


@pytest.mark.skipif(_C.cuda_archs is None, reason="needs an extension built with nvcc")
def test_the_extension_knows_its_cuda():
    driver, built = _C.cuda_versions()
    assert built >= 11000
    assert driver == 0 or driver >= 1000


@pytest.mark.full
def test_cpu_kernels_compile_for_arm(monkeypatch, tmp_path):
    """Linux on ARM: what a build there compiles, the plain kernels, by a cross compiler."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if not compiler:
        pytest.skip("no aarch64-linux-gnu-g++ (Debian, Ubuntu: g++-aarch64-linux-gnu)")
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    flags = runpy.run_path(str(ROOT / "setup.py"))["CXX_FLAGS"].split()
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        subprocess.run(
            [compiler, *flags, "-fopenmp", "-Werror", "-c", source,
             "-o", tmp_path / f"{source.stem}.o"],
            check=True,
        )  # fmt: skip


def test_import_time():
    """import bert_fast adds at most 150 ms of processor time to import torch: the best of three
    processes."""
    code = (
        "import torch, time; begin = time.process_time(); import bert_fast; "
        "print(time.process_time() - begin)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) <= 0.150, times
