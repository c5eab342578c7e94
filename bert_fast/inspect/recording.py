"""Triton's launches, recorded instead of run, and compiled for the chip asked for. So what is
inspected is what would run: the same types, flags, tiles and alignments. Needs no GPU."""

import contextlib
import math
import re
import sys
import tempfile
import types
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

from bert_fast.inspect.chips import CHIPS, REGISTERS
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
    enable_fp_fusion: bool | None  # None: not said
    ctas: int = field(compare=False)  # of its grid
    bytes: int = field(compare=False)  # of its tensors


TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
    torch.int64: "*i64", torch.uint8: "*u8", torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip


@contextlib.contextmanager
def recorded(chip=80):
    """Launches of Triton kernels inside the block are listed, as for ``chip``, not run; of a kernel
    that tunes itself one for each configuration."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    from bert_fast.kernels import common

    before, common.compiling_for = common.compiling_for, chip
    launches, run, tune = [], JITFunction.run, Autotuner.run
    # Some grids are as large as the device: as many multiprocessors as the chip's board has.
    counting = [m for name, m in sys.modules.items() if name.startswith("bert_fast.kernels.")]
    counting = {m: m.processors for m in counting if hasattr(m, "processors")}

    def record(
        kernel, *args, grid, warmup=False, num_warps=4, num_stages=3, maxnreg=None, debug=False,
        sanitize_overflow=True, enable_fp_fusion=None, **kwargs,
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
        grid = grid(given) if callable(grid) else grid
        launches.append(
            Launch(
                kernel, tuple(signature), tuple(constants), tuple(aligned), num_warps, num_stages,
                maxnreg, debug, enable_fp_fusion, math.prod(grid), _num_bytes(given.values()),
            )
        )  # fmt: skip

    def record_all(tuned, *args, **kwargs):
        tuned.nargs = dict(zip(tuned.arg_names, args, strict=False))
        for config in tuned.prune_configs(kwargs):
            given = kwargs | config.all_kwargs()
            if config.pre_hook:
                config.pre_hook(tuned.nargs | given)
            tuned.fn.run(*args, **given)
        tuned.nargs = None

    JITFunction.run, Autotuner.run = record, record_all
    for module in counting:
        module.processors = lambda device: CHIPS[chip].sms
    try:
        yield launches
    finally:
        JITFunction.run, Autotuner.run, common.compiling_for = run, tune, before
        for module, processors in counting.items():
            module.processors = processors


@contextlib.contextmanager
def pretended(chip):
    """Inside the block torch and Triton find a GPU of this chip, for the code of others that asks
    for one. Nothing can run on it; what they remember of it stays."""
    import triton
    from triton.backends.compiler import GPUTarget

    major, minor = divmod(chip, 10)
    board = CHIPS[chip]
    properties = types.SimpleNamespace(
        name=board.name, major=major, minor=minor, multi_processor_count=board.sms, warp_size=32,
        regs_per_multiprocessor=REGISTERS, max_threads_per_block=1024,
        max_threads_per_multi_processor=32 * board.warps,
    )  # fmt: skip
    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", chip, 32), get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("meta"),
    )  # fmt: skip
    active = "_active" if hasattr(triton.runtime.driver, "_active") else "active"  # before 3.5
    with (
        mock.patch.object(triton.runtime.driver, active, driver),
        mock.patch.multiple(
            torch.cuda, is_available=lambda: True, device_count=lambda: 1,
            current_device=lambda: 0, get_device_properties=lambda *_: properties,
            get_device_capability=lambda *_: (major, minor),
        ),
    ):  # fmt: skip
        yield


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
            "maxnreg": launch.maxnreg, "debug": launch.debug, "sanitize_overflow": False,
            # Not said, they are fused: Triton before 3.10 does so by itself.
            "enable_fp_fusion": launch.enable_fp_fusion is not False,
        },
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, sass = (cuobjdump(flag, cubin) for flag in ("-res-usage", "-sass"))
    registers, stack = (int(re.search(rf"{n}:(\d+)", usage)[1]) for n in ("REG", "STACK"))
    spilled = re.search(r"\bSTL\b", sass)  # a stack that nothing is stored to is no spill
    return registers, kernel.metadata.shared, stack if spilled else 0, sass
