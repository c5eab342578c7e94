"""Builds bert_fast._C: one ninja run over csrc/, with no torch in sight.

BERT_FAST_CUDA=auto|on|off      build the CUDA kernels: when nvcc is found, or fail, or not
BERT_FAST_CUDA_ARCHS="80;90a"   for these chips; default: the GPUs nvidia-smi shows, else all,
                                and of either those that nvcc knows
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
ALL_CUDA_ARCHS = ["75", "80", "86", "89", "90a", "100", "120"]
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden"
    " -fno-math-errno -fno-trapping-math -ffp-contract=fast"
    " -Wall -Wno-psabi -Wno-ignored-attributes -Wno-maybe-uninitialized -Wno-uninitialized"
)
AMX_FLAGS = "-mamx-tile -mamx-bf16 -mamx-int8"
# One compilation of each CPU kernel an instruction set; csrc/cpu/dispatch.cpp chooses at run time.
CPU_ISAS = {
    "generic": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512",
}


def find_compiler():
    compiler = shlex.split(os.environ.get("CXX", "")) or [
        next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), "g++")
    ]
    if not shutil.which(compiler[0]):
        sys.exit(
            f"bert_fast: no C++ compiler: '{compiler[0]}' was not found. "
            "Install one (Debian, Ubuntu: apt-get install g++) or set CXX."
        )
    return shlex.join(compiler)


def find_nvcc():
    """The path of nvcc, or None where CUDA kernels are not wanted or cannot be had."""
    mode = os.environ.get("BERT_FAST_CUDA", "auto")
    if mode not in ("auto", "on", "off"):
        sys.exit(f"bert_fast: BERT_FAST_CUDA must be auto, on or off, not '{mode}'.")
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if mode == "on" and not nvcc:
        sys.exit(
            f"bert_fast: BERT_FAST_CUDA=on, but nvcc is neither on PATH nor in {home}/bin. "
            "Install the CUDA toolkit, set CUDA_HOME, or use BERT_FAST_CUDA=off."
        )
    return nvcc if mode != "off" else None


def number(arch):
    """A chip's compute capability times ten: 90 of 90a."""
    return int(arch.rstrip("af"))


def cuda_archs(nvcc):
    """Chips to compile for, as nvcc's sm_ numbers, the oldest first."""
    wanted = os.environ.get("BERT_FAST_CUDA_ARCHS", "").replace(",", ";").split(";")
    wanted = [arch.strip() for arch in wanted if arch.strip()]
    for arch in wanted:
        if not arch.rstrip("af").isdigit():
            sys.exit(f"bert_fast: BERT_FAST_CUDA_ARCHS: '{arch}' is no chip like 80 or 90a.")
    known = chips_known_to(nvcc)
    if unknown := [arch for arch in wanted if number(arch) not in known]:
        sys.exit(
            f"bert_fast: BERT_FAST_CUDA_ARCHS: {nvcc} does not know {', '.join(unknown)}, only "
            f"{', '.join(map(str, sorted(known)))}."
        )
    # A toolkit older or newer than the chips leaves those out: they run the PTX.
    archs = wanted or [a for a in chips_here() or ALL_CUDA_ARCHS if number(a) in known]
    return sorted(set(archs), key=number) or ["80"]


def chips_known_to(nvcc):
    answer = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    if answer.returncode:
        sys.exit(f"bert_fast: {nvcc} --list-gpu-arch failed: {answer.stderr.strip()}")
    return {number(line.split("_")[1]) for line in answer.stdout.split() if "_" in line}


def chips_here():
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found = {line.strip().replace(".", "") for line in answer.stdout.splitlines() if line.strip()}
    return ["90a" if arch == "90" else arch for arch in found]


def cuda_code(archs):
    """nvcc's options: machine code for each chip, and PTX, which the driver compiles for others.
    The newest chip's is for those that are not out yet; 8.0's for those between, like 11.0, which
    runs neither 10.0's code nor 12.0's PTX. Not 7.5's: it has no bf16 products."""
    ptx = sorted({80, max(80, number(archs[-1]))})
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return " ".join(code + [f"-gencode=arch=compute_{n},code=compute_{n}" for n in ptx])


def link_command(cxx, openmp, nvcc):
    if nvcc:
        # nvcc knows where its libraries are. Static: the extension then imports without a
        # driver, and beside any torch.
        command = f"{nvcc} -shared -cudart=static -Xlinker=-s"
        return command + (f" -Xcompiler={openmp}" if openmp else "")
    if sys.platform == "darwin":
        # Python's own symbols are in the process that imports; Apple's linker has no -s.
        return f"{cxx} -shared {openmp} -undefined dynamic_lookup"
    return f"{cxx} -shared {openmp} -s"


class NinjaBuild(build_ext):
    """Writes build.ninja beside the objects and runs it: parallel, and incremental across runs."""

    def build_extension(self, ext):
        if sys.platform == "win32":
            sys.exit("bert_fast: Windows is not supported yet; build in WSL, which is Linux.")
        import pybind11  # a build requirement: absent only where there is nothing to build

        build = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        cxx = find_compiler()
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        nvcc = find_nvcc()
        # Apple's compiler has no OpenMP: kernels then use one core.
        openmp = "-fopenmp" if self.accepts(cxx, "-fopenmp") else ""
        includes = f"-I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
        common = f"{CXX_FLAGS} {openmp} {'-DBERT_FAST_X86' if x86 else ''}"

        archs = []
        if nvcc:
            archs = cuda_archs(nvcc)
            nvcc += f" -ccbin {shlex.split(cxx)[-1]}"
        lines = [
            "ninja_required_version = 1.3",
            f"rule cxx\n  command = {cxx} -MMD -MF $out.d {common} $flags -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = c++ $out",
            f"rule nvcc\n  command = {nvcc} -std=c++17 -O3 -Xcompiler=-fPIC -MMD -MF $out.d"
            " $flags -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = nvcc $out",
            f"rule link\n  command = {link_command(cxx, openmp, nvcc)} -o $out $in",
            "  description = link $out",
        ]
        objects = []
        amx = ""
        tiles = b"#include <immintrin.h>\nint main() { _tile_zero(0); }"
        if x86 and sys.platform == "linux" and self.accepts(cxx, AMX_FLAGS, tiles):
            amx = f"{CPU_ISAS['avx512']} {AMX_FLAGS} -DBERT_FAST_AMX"

        def compile_file(rule, source, out, flags=""):
            objects.append(out)
            path = str(ROOT / "csrc" / source).replace(" ", "$ ").replace(":", "$:")
            lines.append(f"build {out}: {rule} {path}\n  flags = {flags}")

        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            if source.stem in ("dispatch", "encoder", "threads"):  # no arithmetic of their own
                compile_file("cxx", f"cpu/{source.name}", f"{source.stem}.o")
                continue
            if source.stem == "linear_amx":  # fp32 for AMX, or an answer that there is none
                compile_file("cxx", "cpu/linear_amx.cpp", "linear_amx.o", amx)
                continue
            if source.stem in ("attention", "linear") and amx:  # their products in bf16, int8
                compile_file("cxx", f"cpu/{source.name}", f"{source.stem}.amx.o", amx)
            for isa, flags in CPU_ISAS.items() if x86 else [("generic", "")]:
                compile_file("cxx", f"cpu/{source.name}", f"{source.stem}.{isa}.o", flags)

        if nvcc:
            # Compressed: a seventh of the size; the driver unpacks what it loads.
            flags = f"{cuda_code(archs)} -t 0 -Xfatbin=-compress-all"
            for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
                compile_file("nvcc", f"cuda/{source.name}", f"{source.stem}.cuda.o", flags)
            includes += f" -DBERT_FAST_WITH_CUDA '-DBERT_FAST_CUDA_ARCHS=\"{';'.join(archs)}\"'"
        compile_file("cxx", "bindings.cpp", "bindings.o", includes)

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        lines.append(f"build {target.name}: link {' '.join(objects)}")
        (build / "build.ninja").write_text("\n".join(lines) + "\n")

        if subprocess.run([self.ninja(), "-C", str(build)]).returncode:
            sys.exit("bert_fast: a kernel did not compile; the compiler's message is above.")
        shutil.copyfile(build / target.name, target)

    @staticmethod
    def ninja():
        try:
            from ninja import BIN_DIR
        except ImportError:
            return "ninja"
        return os.path.join(BIN_DIR, "ninja")

    @staticmethod
    def accepts(cxx, flags, program=b"int main() {}"):
        """Whether the compiler takes the flags, and its linker what they bring."""
        probe = [*shlex.split(cxx), *flags.split(), "-x", "c++", "-", "-o", os.devnull]
        answer = subprocess.run(probe, input=program, capture_output=True)
        return answer.returncode == 0


setup(
    packages=sorted({*find_packages(include=["bert_fast*"]), "bert_fast.kernels"}),
    package_dir={"bert_fast": "bert_fast", "bert_fast.kernels": "kernels"},
    package_data={"bert_fast": ["py.typed"]},
    ext_modules=[Extension("bert_fast._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
