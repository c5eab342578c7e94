"""Builds the CUDA kernels for the CPU (csrc/host): the module that BERT_FAST_CUDA_HOST names.

Needs g++ and the CUDA headers: nvcc's, or those of the package nvidia-cuda-runtime.
"""

import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Unavailable(RuntimeError):
    """Why there is no host build."""


def cuda_include():
    """The folder of cuda_runtime.h."""
    if nvcc := shutil.which("nvcc"):  # by its own account: it may be a link or a wrapper
        said = subprocess.run(
            [nvcc, "--dryrun", "-cubin", ROOT / "csrc" / "cuda" / "gelu.cu"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
        top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
        return Path(top[1].strip()).resolve() / "include"
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    for header in sorted(packages.glob("*/include/cuda_runtime.h")):
        return header.parent
    raise Unavailable("no CUDA headers: neither nvcc nor the package nvidia-cuda-runtime is here")


def build(folder, csrc=ROOT / "csrc", flags=("-O2",)):
    """Compiles what is out of date in ``folder``; returns the module's path."""
    import pybind11

    if shutil.which("g++") is None:
        raise Unavailable("no g++")
    folder.mkdir(parents=True, exist_ok=True)
    headers = [*csrc.rglob("*.h")]
    sources = [csrc / "bindings.cpp", csrc / "host/runtime.cpp"]
    sources += sorted((csrc / "cuda").glob("*.cu"))
    command = [
        "g++", "-std=c++20", "-fPIC", "-w", "-DBERT_FAST_HOST", *flags, f"-I{cuda_include()}",
        f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}",
    ]  # fmt: skip
    stamp = folder / "command"
    if not stamp.is_file() or stamp.read_text() != str(command):
        for old in folder.glob("*.o"):
            old.unlink()
        stamp.write_text(str(command))

    def compile(path):
        out = folder / f"{path.name}.o"
        newest = max(p.stat().st_mtime for p in (path, *headers))
        if not out.is_file() or out.stat().st_mtime < newest:
            subprocess.run([*command, "-x", "c++", "-c", "-o", out, path], check=True)
            return out, True
        return out, False

    with ThreadPoolExecutor(2) as pool:
        objects, fresh = zip(*pool.map(compile, sources), strict=True)
    module = folder / "_cuda_host.so"
    if any(fresh) or not module.is_file():
        subprocess.run(["g++", "-shared", *flags, "-o", module, *objects], check=True)
    return module
