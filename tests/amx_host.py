"""The products on AMX with that unit emulated (csrc/host/amx.h), for processors without it.

Needs g++ on x86-64 Linux. Compiled for this processor's other instructions, whichever they are.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
from conftest import ISAS

from bert_fast import _C
from bert_fast.backends import cpu

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [  # arithmetic as setup.py has it
    "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    "-march=native", "-DBERT_FAST_X86", "-DBERT_FAST_AMX", "-DBERT_FAST_HOST",
    "-fopenmp", "-fPIC", "-shared", "-w",
]  # fmt: skip
NAMES = "attention", "linear", "linear_amx", "threads"
FUNCTIONS = {
    "linear_kind": (c_char_p, c_int),
    "linear_is_fast": (c_bool, c_int),
    "linear_packed_size": (c_int64, c_int, c_int64, c_int64),
    "linear_scratch_size": (c_int64, c_int, c_int64, c_int64, c_int),
    "linear_pack": (None, c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int),
    "linear_unpack": (None, c_int, c_int64, c_int64, c_void_p, c_void_p),
    "linear_forward": (
        None, c_int, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p,
        c_int, c_int, c_int64, c_int64,
    ),
    "attention_in_bf16": (
        None, c_int64, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_float, c_bool,
        c_int, POINTER(c_int64), POINTER(c_int64), c_void_p, c_void_p,
    ),
}  # fmt: skip


def build(folder):
    """The library's path; compiled where these sources were not yet, on this kind of processor."""
    csrc = ROOT / "csrc"
    sources = [csrc / "cpu" / f"{name}.cpp" for name in NAMES]
    sources.append(csrc / "host" / "amx.cpp")
    native = subprocess.run(
        ["g++", "-march=native", "-Q", "--help=target"], capture_output=True, check=True
    ).stdout
    known = hashlib.sha256(repr((FLAGS, native)).encode())
    headers = [*csrc.glob("*.h"), *(csrc / "cpu").glob("*.h"), csrc / "host" / "amx.h"]
    for path in sorted({*sources, *headers}):
        known.update(path.read_bytes())
    library = folder / f"amx-{known.hexdigest()[:16]}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        mine = folder / f"{os.getpid()}.so"  # others may be compiling the same
        subprocess.run(["g++", *FLAGS, "-o", mine, *sources], check=True)
        mine.replace(library)
    return library


class Emulated:
    """Stands for bert_fast._C in packed products and in attention on bf16, layer by layer."""

    AttentionShape = dict
    Samples, gelu_forward = _C.Samples, staticmethod(_C.gelu_forward)

    def __init__(self):
        library = ctypes.CDLL(str(build(ROOT / "build" / "amx_host")))
        for name, (result, *arguments) in FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.linear_kind = lambda precision: library.linear_kind(precision).decode()

    def attention_forward(self, shape, q, k, v, out, bias, lse):
        if shape["precision"] == 0:
            return _C.attention_forward(_C.AttentionShape(**shape), q, k, v, out, bias, lse)
        assert (shape["dtype"], shape["dropout_p"]) == (0, 0.0)
        names = (
            "batch", "num_heads", "head_dim", "total_q", "total_k", "cu_q", "cu_k", "scale",
            "causal", "num_threads",
        )  # fmt: skip
        table, strided = shape["position_bias"][:3], (*q, *k, *v, *out)
        self.attention_in_bf16(
            *(shape[name] for name in names), (c_int64 * 3)(*table), (c_int64 * 12)(*strided),
            bias, lse,
        )  # fmt: skip


emulated = functools.cache(Emulated)


def use(monkeypatch):
    """From now on packed products run on it; returns what stands for bert_fast._C."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("AMX is emulated by g++ on Linux, x86-64")
    monkeypatch.setattr(cpu, "_C", emulated())
    return emulated()


@contextlib.contextmanager
def without():
    """Meanwhile packed products run on the extension's kernels for this processor without AMX."""
    best = _C.cpu_isa()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_C", _C)
        try:
            _C.set_cpu_isa("avx512_no_amx" if "avx512" in ISAS else ISAS[0])
            yield
        finally:
            _C.set_cpu_isa(best)
