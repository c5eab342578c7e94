"""``bert-fast inspect``: what the compilers made of the kernels, from their output. Needs no GPU.

The CUDA kernels are read from the extension that is installed, for the chips it was built for. Each
of the Triton backend's functions is called with tensors on the meta device; its launches are
recorded instead of run, and compiled for the chip asked for. So what is inspected is what would
run: the same types, flags, tiles and alignments.
"""

import contextlib
import functools
import itertools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from bert_fast import backends


@dataclass(frozen=True)
class Chip:
    """Of a compute capability: what bounds a streaming multiprocessor's kernels, and the peaks its
    maker publishes for one board."""

    name: str
    shared: int  # bytes a CTA may ask for
    shared_sm: int  # bytes of an SM
    warps: int  # of an SM
    products: str  # the matrix instruction, as a pattern of SASS
    copy: float  # TB/s
    matmul: float  # dense bf16 TFLOP/s


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; data sheets.
KIB, REGISTERS = 1024, 65536
CHIPS = {
    75: Chip("T4", 64 * KIB, 64 * KIB, 32, "HMMA", 0.32, 65),  # in fp16; it has no bf16
    80: Chip("A100", 163 * KIB, 164 * KIB, 64, "HMMA", 2.04, 312),
    89: Chip("RTX 4090", 99 * KIB, 100 * KIB, 48, "HMMA", 1.01, 165),
    90: Chip("H100", 227 * KIB, 228 * KIB, 64, "HGMMA", 3.35, 989),
    100: Chip("B200", 227 * KIB, 228 * KIB, 64, r"UTC\w*MMA", 8.0, 2250),
    120: Chip("RTX 5090", 99 * KIB, 100 * KIB, 48, "HMMA", 1.79, 209),
}


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel and how it is specialised."""

    kernel: object
    signature: tuple  # (name, type)
    constants: tuple  # (name, value)
    aligned: tuple  # argument numbers that are multiples of 16
    num_warps: int
    num_stages: int
    maxnreg: int | None
    debug: bool  # its device_assert is compiled


@dataclass
class Compiled:
    """What a launch was compiled to."""

    work: str
    flops: int
    bytes: int
    kernel: str
    chip: int
    num_warps: int
    registers: int
    shared: int | None  # bytes; None: CUDA C++ asks for it at the launch
    spills: int  # bytes of local memory a thread
    products: str  # the instruction of its matrix products, or ""
    widest_load: int  # bits, of a thread's load from global memory

    @property
    def ctas(self):
        """CTAs that an SM holds at once."""
        chip = CHIPS[self.chip]
        per_warp = -(-self.registers * 32 // 256) * 256  # how they are handed out
        by_registers = REGISTERS // (per_warp * self.num_warps)
        by_shared = chip.shared_sm // ((self.shared or 0) + KIB)  # 1 KiB is the system's
        return min(by_registers, by_shared, chip.warps // self.num_warps, 32)

    @property
    def possible_us(self):
        """The least microseconds that the board's peaks allow for the work (fp32: the bytes')."""
        chip = CHIPS[self.chip]
        products = 0 if "float32" in self.work else self.flops / chip.matmul / 1e6
        return max(self.bytes / chip.copy / 1e6, products)

    def faults(self):
        """What no kernel of ours may have."""
        chip, found = CHIPS[self.chip], []
        if self.spills:
            found.append(f"{self.spills} bytes of registers spilled")
        if (self.shared or 0) > chip.shared:
            found.append(f"{self.shared} bytes of shared memory; the chip has {chip.shared}")
        if self.ctas < 1:
            found.append("no CTA of it fits an SM")
        # A tile of fewer than 64 rows, all that 256 columns leave room for in backward, takes the
        # older tensor-core instruction on any chip.
        small = "of 256" in self.work and "backward" in self.work
        wanted = f"{chip.products}|HMMA" if small else chip.products
        # Triton has no tensor-core path for 7.5.
        products = self.kernel in PRODUCTS and "float32" not in self.work and self.chip >= 80
        if products and not re.fullmatch(wanted, self.products):
            found.append(f"its matrix products are {self.products or 'none'}, not {wanted}")
        if self.widest_load < 128 and self.shared is not None:  # CUDA's have narrow variants
            found.append(f"its widest load is {self.widest_load} bits")
        return found


# A line of SASS:  /*0080*/  @!P0 LDG.E.128 R4, [R2.64] ;
OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
MATRIX = re.compile(r"(HMMA|HGMMA|IMMA|QMMA|UTC\w*MMA)\b")

# ------------------------------------------------------------------------------------------------
# What is inspected
# ------------------------------------------------------------------------------------------------


PRODUCTS = ("attention.forward", "attention.backward_q", "attention.backward_kv",
            "linear.forward", "linear.backward")  # fmt: skip


def cases(full=False):
    """(name, work, a call of the backend's function on meta tensors): the main variants, or all."""
    from bert_fast.bench import works

    kernels, meta = backends.import_module("triton"), functools.partial(torch.empty, device="meta")
    seed = meta(1, dtype=torch.int64)
    # float16 compiles as bfloat16 does.
    dtypes = [torch.bfloat16, torch.float32] if full else [torch.bfloat16]
    sizes = [(64, 512), (64, 128), (64, 64), (32, 128), (80, 512), (128, 512), (256, 512)]
    for dtype, (head_dim, longest), (causal, dropout_p), backward in itertools.product(
        dtypes, sizes if full else sizes[:2], [(False, 0.0), (full, 0.1)], (False, True)
    ):
        work = works.Attention(
            dtype, "meta", backward, lengths=(longest,) * 32, num_heads=12, head_dim=head_dim,
            causal=causal, dropout_p=dropout_p,
        )  # fmt: skip
        tokens, heads = work.tokens, work.num_heads
        q, k, v = meta(tokens, 3, heads, head_dim, dtype=dtype).unbind(1)
        options = (work.cu_seqlens, work.cu_seqlens, longest, longest, meta(3, heads, head_dim),
                   head_dim**-0.5, causal, dropout_p, seed if dropout_p else None)  # fmt: skip
        if backward:
            dout, lse = torch.empty_like(q), meta(heads, tokens)
            call = functools.partial(
                kernels.attention_backward, dout, q, k, v, dout, lse, *options, q, k, v
            )
        else:
            call = functools.partial(kernels.attention_forward, q, k, v, *options)
        yield str(work), work, call
    for dtype, width, dropout_p, backward in itertools.product(
        dtypes, (384, 768, 1024, 4096) if full else (768,), (0.0, 0.1), (False, True)
    ):
        work = works.LayerNorm(dtype, "meta", backward, rows=16384, width=width)
        name = f"{work}{', dropout' * (dropout_p > 0)}"
        x, vector, statistic = meta(16384, width, dtype=dtype), meta(width), meta(16384)
        some = seed if dropout_p else None
        if backward:
            call = functools.partial(
                kernels.layer_norm_backward, x, x, statistic, statistic, vector, True, dropout_p,
                some,
            )  # fmt: skip
        else:
            call = functools.partial(
                kernels.layer_norm_forward, x, vector, vector, x, vector, 1e-12, dropout_p, some
            )
        yield name, work, call
    for dtype, approximate, backward in itertools.product(
        dtypes, ("none", "tanh") if full else ("none",), (False, True)
    ):
        work = works.Gelu(dtype, "meta", backward, rows=16384, width=3072)
        x, vector = meta(16384, 3072, dtype=dtype), meta(3072)
        function = kernels.gelu_backward if backward else kernels.gelu_forward
        name = f"{work}{', tanh' * (approximate == 'tanh')}"
        yield name, work, functools.partial(function, *[x] * (1 + backward), vector, approximate)
    for dtype, (width, out_width), approximate, backward in itertools.product(
        dtypes, ((768, 3072), (1024, 4096)) if full else ((768, 3072),),
        ("none", "tanh") if full else ("none",), (False, True),
    ):  # fmt: skip
        work = works.LinearGelu(
            dtype, "meta", backward, rows=16384, width=width, out_width=out_width
        )
        x, y = meta(16384, width, dtype=dtype), meta(16384, out_width, dtype=dtype)
        weight, vector = meta(out_width, width, dtype=dtype), meta(out_width)
        name = f"{work}{', tanh' * (approximate == 'tanh')}"
        if backward:
            call = functools.partial(
                kernels.linear_gelu_backward, y, y, vector, weight, approximate
            )
        else:
            call = functools.partial(
                kernels.linear_gelu_forward, x, weight, vector, approximate, True
            )
        yield name, work, call
    for dtype in dtypes:
        work = works.LayerNorm(dtype, "meta", rows=16384, width=768)
        ids, tables = meta(16384, dtype=torch.int64), (meta(n, 768) for n in (30522, 512, 2))
        call = functools.partial(
            kernels.embedding_forward, ids, ids, ids, *tables, meta(768), meta(768), 1e-12, dtype,
            True,
        )  # fmt: skip
        yield str(work).replace("layer_norm", "embedding + layer_norm"), work, call


# ------------------------------------------------------------------------------------------------
# Recording and compiling
# ------------------------------------------------------------------------------------------------

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip


@contextlib.contextmanager
def recorded(chip=80):
    """Launches of Triton kernels inside the block are listed, as for ``chip``, not run."""
    from triton.runtime.jit import JITFunction

    from bert_fast.kernels import common

    before, common.compiling_for = common.compiling_for, chip
    launches, run = [], JITFunction.run

    def record(
        kernel, *args, grid, warmup=False, num_warps=4, num_stages=3, maxnreg=None, debug=False,
        sanitize_overflow=True, **kwargs,
    ):  # fmt: skip
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, aligned = [], [], []
        for i, parameter in enumerate(kernel.params):
            name, value = parameter.name, given[parameter.name]
            special = not parameter.do_not_specialize
            kind = _type_of(value)
            if parameter.is_constexpr or (special and kind == "i32" and value == 1):
                kind = "constexpr"
                constants.append((name, value))
            elif special and (kind[0] == "*" or (kind[0] == "i" and value % 16 == 0)):
                aligned.append(i)  # the allocator's addresses are multiples of 16, too
            signature.append((name, kind))
        launches.append(
            Launch(
                kernel, tuple(signature), tuple(constants), tuple(aligned), num_warps, num_stages,
                maxnreg, debug,
            )
        )  # fmt: skip

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run, common.compiling_for = run, before


def _type_of(value):
    """Triton's type of an argument."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if hasattr(value, "block_shape"):
        return f"tensordesc<{TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if isinstance(value, (str, bool)) or -(2**31) <= value < 2**31 else "i64"


def compile(launch, chip):
    """(registers, shared, spills, SASS) of a launch on a chip."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=launch.kernel, signature=dict(launch.signature),
        constexprs={(launch.kernel.arg_names.index(name),): v for name, v in launch.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )  # fmt: skip
    kernel = triton.compile(
        source, target=GPUTarget("cuda", chip, 32),
        options={
            "num_warps": launch.num_warps, "num_stages": launch.num_stages,
            "maxnreg": launch.maxnreg, "debug": launch.debug,
            "sanitize_overflow": False,
        },
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, sass = (_cuobjdump(flag, cubin) for flag in ("-res-usage", "-sass"))
    registers, stack = (int(re.search(rf"{n}:(\d+)", usage)[1]) for n in ("REG", "STACK"))
    spilled = re.search(r"\bSTL\b", sass)  # a stack that nothing is stored to is no spill
    return registers, kernel.metadata.shared, stack if spilled else 0, sass


def _cuobjdump(*arguments):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run(
        [tool, *map(str, arguments)], capture_output=True, text=True, check=True
    ).stdout


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
                    registers, shared, spills, products[0] if products else "",
                    max(map(_bits, loads), default=0),
                )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# CUDA C++
# ------------------------------------------------------------------------------------------------

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
        usage, sass = (_cuobjdump(f, _C.__file__, "-arch", arch) for f in ("-res-usage", "-sass"))
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
            warps = 4 if file == "attention_mma" else 16 if kernel.endswith(" 512>") else 8
            yield Compiled(
                kernel, 0, 0, f"cuda/{file}.cu", chip, warps,
                int(registers), None, int(stack) if spilled else 0,
                products[0] if products else "", max(map(_bits, loads), default=0),
            )  # fmt: skip


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


def _bits(opcode):
    if opcode.startswith("UTMALDG"):
        return 128
    return next((int(part) for part in opcode.split(".") if part in ("64", "128")), 32)


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
