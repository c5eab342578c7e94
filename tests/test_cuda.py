"""CUDA kernels: on a GPU where there is one; their code run on the CPU, and compiled, anywhere."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import DTYPES, assert_within

import bert_fast
from bert_fast import backends, cpu

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc")
NO_GPU = backends.why_unavailable("cuda")

needs_gpu = pytest.mark.skipif(NO_GPU is not None, reason=f"needs an NVIDIA GPU: {NO_GPU}")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc and its headers")
SHAPES = [(1, 16), (7, 3072), (63, 77), (300, 24)]


def check(run, shape, dtype, approximate, with_bias):
    """run(x, bias, approximate) against float64."""
    x = (torch.randn(*shape) * 3).to(dtype)
    bias = torch.randn(shape[-1]) if with_bias else None

    def eager(dtype):
        low = None if bias is None else bias.to(dtype)
        return bert_fast.gelu(x.to(dtype), low, approximate=approximate, backend="eager")

    assert_within(run(x, bias, approximate), eager(dtype), eager(torch.float64))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gelu_on_a_gpu(dtype, shape, approximate, with_bias):
    def run(x, bias, approximate):
        bias = None if bias is None else bias.cuda()
        return bert_fast.gelu(x.cuda(), bias, approximate=approximate, backend="cuda").cpu()

    check(run, shape, dtype, approximate, with_bias)


@pytest.fixture(scope="module")
def toolkit():
    """nvcc's own folder, by its account: the nvcc on PATH may be a link or a wrapper."""
    said = subprocess.run(
        [NVCC, "--dryrun", "-cubin", ROOT / "csrc" / "cuda" / "gelu.cu"],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    return Path(re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)[1].strip()).resolve()


@pytest.fixture(scope="module")
def host_gelu(toolkit, tmp_path_factory):
    """csrc/cuda/gelu.cu as a CPU library: the same source, launches turned into loops."""
    folder = tmp_path_factory.mktemp("cuda_host")
    source = (ROOT / "csrc" / "cuda" / "gelu.cu").read_text()
    launch = re.compile(r"(\w+<[^;{}]*?>)<<<(\w+), (\w+), 0, \w+>>>\(")
    source, count = launch.subn(r"host_launch(\1, \2, \3, ", source)
    assert count == 1
    (folder / "gelu.cpp").write_text(
        f'#include "{ROOT}/tests/cuda_host.h"\n{source}\n'
        "extern \"C\" void run(int dtype, int64_t rows, int64_t width, const void* x, "
        "const float* bias, void* out, int approximate) {\n"
        "  using namespace bert_fast;\n"
        "  cuda::gelu_forward({static_cast<DType>(dtype), rows, width, x, bias, out,"
        " static_cast<Gelu>(approximate), 1}, 0, nullptr);\n}\n"
    )  # fmt: skip
    library = folder / "gelu.so"
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-w",
        f"-I{ROOT}/csrc/cuda",
        f"-I{toolkit}/include",
    ]
    subprocess.run([*command, "-o", library, folder / "gelu.cpp"], check=True)
    return ctypes.CDLL(str(library))


@needs_nvcc
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("misaligned", [False, True])
def test_gelu_source_on_the_cpu(host_gelu, dtype, shape, approximate, with_bias, misaligned):
    def run(x, bias, approximate):
        if misaligned:
            x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        out = torch.full_like(x, torch.nan)
        host_gelu.run(
            cpu.DTYPES[dtype], ctypes.c_int64(shape[0]), ctypes.c_int64(shape[1]),
            ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(0 if bias is None else bias.data_ptr()),
            ctypes.c_void_p(out.data_ptr()), cpu.APPROXIMATE[approximate],
        )  # fmt: skip
        return out

    check(run, shape, dtype, approximate, with_bias)


@needs_nvcc
@pytest.mark.parametrize(
    "arch",
    [
        "90a",
        *(pytest.param(a, marks=pytest.mark.full) for a in ["75", "80", "86", "89", "100", "120"]),
    ],
)
def test_compiles_without_spills_with_wide_accesses(arch, tmp_path):
    """ptxas reports no spills; the main loops load and store 16 bytes at a time."""
    cubin = tmp_path / "gelu.cubin"
    command = [NVCC, "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    source = ROOT / "csrc" / "cuda" / "gelu.cu"
    report = subprocess.run(
        [*command, "-cubin", "-Xptxas=-v", "-o", cubin, source],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    assert len(spills) == 2 * 12  # loads and stores; 3 dtypes, 2 widths, 2 kinds
    assert not any(spills)
    ptx = tmp_path / "gelu.ptx"
    command[3] = f"-arch=compute_{arch}"
    subprocess.run([*command, "-ptx", "-o", ptx, source], check=True)
    assert len(re.findall(r"ld\.global\S*\.v4|ld\.global\S*\.v2\.\w64", ptx.read_text())) >= 6
    assert len(re.findall(r"st\.global\S*\.v4|st\.global\S*\.v2\.\w64", ptx.read_text())) >= 6
