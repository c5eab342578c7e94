"""All kernels, Triton's and CUDA's, as one table. The CUDA kernels are read from the extension
that is installed, for the chips it was built for."""

import re
import shutil
import subprocess

from bert_fast import backends
from bert_fast.inspect.cases import cases
from bert_fast.inspect.chips import CHIPS
from bert_fast.inspect.recording import compile, recorded
from bert_fast.inspect.sass import MATRIX, OPCODE, Compiled, _bits, cuobjdump


def inspect(chips, names="", full=False):
    """Compiled kernels of the works whose name contains ``names``, for each chip; launches that are
    specialised alike once."""
    if backends.interpreted("triton"):
        raise ValueError("TRITON_INTERPRET is set: nothing would be compiled")
    seen = set()
    for name, work, call in cases(full):
        if names not in name:
            continue
        for chip in chips:
            with recorded(chip) as launches:
                call()
            for launch in launches:
                if (chip, launch) in seen:
                    continue
                seen.add((chip, launch))
                file = launch.kernel.__module__.rpartition(".")[2]
                registers, shared, spills, sass = compile(launch, chip)
                opcodes = set(OPCODE.findall(sass))
                products = sorted(m[1] for m in map(MATRIX.match, opcodes) if m)
                loads = [o for o in opcodes if o.startswith(("LDG", "UTMALDG"))]
                yield Compiled(
                    name, work.flops, work.num_bytes,
                    f"{file}.{launch.kernel.__name__.lstrip('_')}", chip, launch.num_warps,
                    registers, shared, spills, _strongest(products, chip),
                    max(map(_bits, loads), default=0),
                )  # fmt: skip


# "... Function _ZN...:" and, below it, its registers and stack
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)")


def cuda_kernels(chips, names=""):
    """The CUDA kernels in bert_fast._C whose name contains ``names``, for each chip it has."""
    from bert_fast import _C

    built = {int(arch.rstrip("af")): arch for arch in (_C.cuda_archs or "").split(";") if arch}
    for chip in chips:
        if chip not in built:
            continue
        arch = f"sm_{built[chip]}"
        usage, sass = (cuobjdump(f, _C.__file__, "-arch", arch) for f in ("-res-usage", "-sass"))
        code = {}
        for part in sass.split("Function : ")[1:]:
            symbol, _, body = part.partition("\n")
            code[symbol.strip()] = body
        for symbol, registers, stack in USAGE.findall(usage):
            file, kernel = _kernel_name(symbol)
            opcodes = set(OPCODE.findall(code.get(symbol, "")))
            if names not in f"{file}.{kernel}" or not opcodes:
                continue
            products = sorted(m[1] for m in map(MATRIX.match, opcodes) if m)
            loads = [o for o in opcodes if o.startswith(("LDG", "LDGSTS"))]
            spilled = any(o.startswith("STL") for o in opcodes)
            wide, few = kernel.endswith(" 512>"), file.startswith("attention_mma") or file == "gelu"
            warps = 4 if few else 16 if wide else 8
            yield Compiled(
                kernel, 0, 0, f"cuda/{file}.cu", chip, warps,
                int(registers), None, int(stack) if spilled else 0,
                _strongest(products, chip), max(map(_bits, loads), default=0),
            )  # fmt: skip


def _strongest(products, chip):
    """Of a kernel's matrix instructions: the chip's own, or else the first."""
    own = (p for p in products if re.fullmatch(CHIPS[chip].products, p))
    return next(own, products[0] if products else "")


def _kernel_name(symbol):
    """File and readable name of a mangled kernel; c++filt comes with every g++."""
    file = re.search(r"_\d+_([a-z_]+)_cu_", symbol)
    if shutil.which("c++filt"):
        text = subprocess.run(["c++filt", symbol], capture_output=True, text=True).stdout
        if found := re.search(r"namespace\)::(\w+(?:<.*>)?)\(", text):
            types = {"__nv_bfloat16": "bf16", "__half": "fp16", "(bert_fast::Gelu)0": "erf",
                     "(bert_fast::Gelu)1": "tanh"}  # fmt: skip
            symbol = found[1]
            for long, short in types.items():
                symbol = symbol.replace(long, short)
    return file[1] if file else "", symbol


def table(compiled):
    """A rich table of what :func:`inspect` gave."""
    from rich.table import Table

    shown = Table(title="kernels, as compiled")
    for column in ("work", "kernel", "chip", "warps", "registers", "shared", "spills", "CTAs / SM",
                   "products", "load, bits", "FLOPs", "bytes", "possible, us"):  # fmt: skip
        shown.add_column(column, justify="left" if column in ("work", "kernel") else "right")
    last = None
    for c in compiled:
        if c.work != last:
            shown.add_section()
        chip = f"{c.chip} ({CHIPS[c.chip].name})"
        shown.add_row(
            c.work if c.work != last else "", c.kernel, chip, f"{c.num_warps}", f"{c.registers}",
            "at launch" if c.shared is None else f"{c.shared:,}", f"{c.spills}", f"{c.ctas}",
            c.products, f"{c.widest_load}", f"{c.flops:.3g}", f"{c.bytes:.3g}",
            f"{c.possible_us:.1f}",
        )  # fmt: skip
        last = c.work
    return shown
