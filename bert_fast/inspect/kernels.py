"""All kernels, Triton's and CUDA's, as one table. The CUDA kernels are read from the extension
that is installed, for the chips it was built for."""

import re
import shutil
import subprocess

from bert_fast import backends
from bert_fast.inspect import tiles
from bert_fast.inspect.cases import cases
from bert_fast.inspect.chips import CHIPS
from bert_fast.inspect.counts import count, lane_bits
from bert_fast.inspect.grid import of_work
from bert_fast.inspect.loops import MATRIX
from bert_fast.inspect.recording import compile, recorded
from bert_fast.inspect.sass import OPCODE, Compiled, cuobjdump


def inspect(chips, names="", full=False):
    """Compiled kernels of the works whose name contains ``names``, for each chip; launches that are
    specialised alike once."""
    return compiled_cases((case for case in cases(full) if names in case[0]), chips)


def compiled_cases(given, chips):
    """The same, of (name, work, call) as :mod:`bert_fast.inspect.cases` has them."""
    if backends.interpreted("triton"):
        raise ValueError("TRITON_INTERPRET is set: nothing would be compiled")
    seen = set()
    for name, work, call in given:
        for chip in chips:
            with recorded(chip) as launches:
                call()
            for launch in launches:
                if (chip, launch) in seen:
                    continue
                seen.add((chip, launch))
                file = launch.kernel.__module__.rpartition(".")[2]
                kernel = f"{file}.{launch.kernel.__name__.lstrip('_')}"
                sizes = dict(launch.constants)
                tile = tiles.of_launch(kernel, sizes, work)
                yield compiled_launch(
                    launch, chip, name, work.flops, work.num_bytes, kernel, tile,
                    tile and of_work(work, kernel, tile, sizes, chip, launch.ctas),
                    0 if file == "embedding" else launch.bytes,  # tables, of which rows are read
                )  # fmt: skip


def compiled_launch(launch, chip, name, flops, num_bytes, kernel, tile, grid=None, moved=0):
    """:class:`Compiled` of a recorded launch; counted, if it is known what its ``tile`` is."""
    registers, shared, spills, sass = compile(launch, chip)
    return Compiled(
        name, flops, num_bytes, kernel, chip, launch.num_warps, registers, shared, spills,
        *products_and_loads(sass, chip), tile and count(sass, chip, launch.num_warps, tile), grid,
        moved,
    )  # fmt: skip


# "... Function _ZN...:" and, below it, its registers and stack
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)")


def cuda_kernels(chips, names=""):
    """The CUDA kernels in bert_fast._C whose name contains ``names``, for each chip it has."""
    from bert_fast import _C

    built = {int(arch.rstrip("af")): arch for arch in (_C.cuda_archs or "").split(";") if arch}
    for chip in chips:
        if chip in built:
            yield from cuda_kernels_in(_C.__file__, built[chip], names)


def cuda_kernels_in(path, arch, names=""):
    """The same, of a library or a cubin, for one of the chips in it (``arch``: "80", "90a")."""
    chip = int(arch.rstrip("af"))
    usage, sass = (cuobjdump(f, path, "-arch", f"sm_{arch}") for f in ("-res-usage", "-sass"))
    code = {}
    for part in sass.split("Function : ")[1:]:
        symbol, _, body = part.partition("\n")
        code[symbol.strip()] = body
    for symbol, registers, stack in USAGE.findall(usage):
        file, kernel = _kernel_name(symbol)
        body = code.get(symbol, "")
        opcodes = set(OPCODE.findall(body))
        if names not in f"{file}.{kernel}" or not opcodes:
            continue
        spilled = any(o.startswith("STL") for o in opcodes)
        warps, tile = tiles.warps_of_cuda(file, kernel), tiles.of_cuda(file, kernel)
        yield Compiled(
            kernel, 0, 0, f"cuda/{file}.cu", chip, warps, int(registers), None,
            int(stack) if spilled else 0, *products_and_loads(body, chip),
            tile and count(body, chip, warps, tile),
        )  # fmt: skip


def products_and_loads(sass, chip):
    """The strongest matrix instruction, and the widest load's bits."""
    opcodes = set(OPCODE.findall(sass))
    products = sorted(m[1] for m in map(MATRIX.match, opcodes) if m)
    loads = [o for o in opcodes if o.startswith(("LDG", "UTMALDG"))]
    return _strongest(products, chip), max(map(lane_bits, loads), default=0)


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
