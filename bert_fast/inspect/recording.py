"""Triton's launches, recorded instead of run, and compiled for the chip asked for. So what is
inspected is what would run: the same types, flags, tiles and alignments. Needs no GPU."""

import contextlib
import math
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bert_fast.inspect.chips import CHIPS
from bert_fast.inspect.sass import cuobjdump


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
    enable_fp_fusion: bool
    ctas: int = field(compare=False)  # of its grid
    bytes: int = field(compare=False)  # of its tensors


TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
    torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip


@contextlib.contextmanager
def recorded(chip=80):
    """Launches of Triton kernels inside the block are listed, as for ``chip``, not run."""
    from triton.runtime.jit import JITFunction

    from bert_fast.kernels import common

    before, common.compiling_for = common.compiling_for, chip
    launches, run = [], JITFunction.run
    # Some grids are as large as the device: as many multiprocessors as the chip's board has.
    counting = [m for name, m in sys.modules.items() if name.startswith("bert_fast.kernels.")]
    counting = {m: m.processors for m in counting if hasattr(m, "processors")}

    def record(
        kernel, *args, grid, warmup=False, num_warps=4, num_stages=3, maxnreg=None, debug=False,
        sanitize_overflow=True, enable_fp_fusion=False, **kwargs,
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
                maxnreg, debug, enable_fp_fusion, math.prod(grid), _num_bytes(given.values()),
            )
        )  # fmt: skip

    JITFunction.run = record
    for module in counting:
        module.processors = lambda device: CHIPS[chip].sms
    try:
        yield launches
    finally:
        JITFunction.run, common.compiling_for = run, before
        for module, processors in counting.items():
            module.processors = processors


def _num_bytes(arguments):
    """Of tensors, descriptors' too; of one that also stands in for what is not given, once."""
    given = {id(t): t for t in (getattr(value, "base", value) for value in arguments)}
    return sum(t.numel() * t.itemsize for t in given.values() if isinstance(t, torch.Tensor))


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
            "sanitize_overflow": False, "enable_fp_fusion": launch.enable_fp_fusion,
        },
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, sass = (cuobjdump(flag, cubin) for flag in ("-res-usage", "-sass"))
    registers, stack = (int(re.search(rf"{n}:(\d+)", usage)[1]) for n in ("REG", "STACK"))
    spilled = re.search(r"\bSTL\b", sass)  # a stack that nothing is stored to is no spill
    return registers, kernel.metadata.shared, stack if spilled else 0, sass
