"""Kernels of others, where they are installed, counted as ours are: Triton's compiled for the chip
asked for, libraries' as they are. No kernel of theirs is run."""

import importlib.util
import re
import subprocess
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from bert_fast.bench import works
from bert_fast.inspect.counts import Tile, count
from bert_fast.inspect.inductor import NotWritten, inductor
from bert_fast.inspect.kernels import USAGE, compiled_launch, products_and_loads
from bert_fast.inspect.recording import recorded
from bert_fast.inspect.sass import Compiled, cuobjdump
from bert_fast.inspect.tutorial import tutorial


@dataclass(frozen=True)
class Library:
    """An attention library: where its kernels are, and which one, of head_dim 64 in bfloat16
    without a mask or dropout, is counted."""

    package: str
    archs: dict  # chip -> the code's name
    kernel: re.Pattern  # of a demangled name, with the tile's rows and cols
    rows: int  # of the tile that a warp has
    loading: int = 0  # warps of a CTA that compute nothing


LIBRARIES = {
    "FlashAttention-3": Library(
        "fa3_fwd", {90: "sm_90a"},
        re.compile(r"CollectiveMainloopFwdSm90<2, tuple<1, 1, 1>, "
                   r"tuple<(?P<rows>\d+), (?P<cols>\d+), 64>, 64, bfloat16_t, float, "
                   r"arch::Sm90(, false){7}, \w+, true, false, false"),
        rows=16, loading=4,
    ),
    "FlashAttention-2": Library(
        "flash_attn_2_cuda", {80: "sm_80", 90: "sm_90"},
        re.compile(r"flash_fwd_kernel<Flash_fwd_kernel_traits<"
                   r"64, (?P<rows>\d+), (?P<cols>\d+), 4, false, false, bfloat16_t, .*>"
                   r"(, false){4}, true"),
        rows=32,
    ),
}  # fmt: skip


def others(chips, tutorial_path=None):
    """(the :class:`Compiled` kernels of others, {name: why it is not counted}); with the attention
    of Triton's tutorial, if its file is given."""
    found, missing = [], {}
    if tutorial_path is None:
        missing["Triton's tutorial"] = "--tutorial gives its file"
    else:
        found += [c for chip in chips if chip >= 80 for c in tutorial(tutorial_path, chip)]
        if min(chips) < 80:
            missing["Triton's tutorial before 8.0"] = "it is for later chips"
    for name, library in LIBRARIES.items():
        if not (path := _library(library.package)):
            missing[name] = f"{library.package} is not installed"
            continue
        counted = [c for chip in chips for c in attention(name, library, path, chip)]
        if not counted:
            missing[name] = f"{path.name} has no such kernel for {', '.join(map(str, chips))}"
        found += counted
    if importlib.util.find_spec("liger_kernel"):
        found += [liger(chip) for chip in chips]
    else:
        missing["Liger"] = "liger_kernel is not installed"
    for chip in chips:
        try:
            found += inductor(chip)
        except (NotWritten, BrokenProcessPool) as error:
            missing[f"torch's Inductor on {chip}"] = str(error)
    return found, missing


def _library(package):
    """The shared library that a package is, or has."""
    spec = importlib.util.find_spec(package)
    if not spec:
        return None
    if spec.origin and spec.origin.endswith(".so"):
        return Path(spec.origin)
    folders = map(Path, spec.submodule_search_locations or ())
    return next((path for folder in folders for path in sorted(folder.glob("*.so"))), None)


def attention(name, library, path, chip):
    """The library's kernel for the chip, if it has one: the first whose name matches."""
    if not (arch := library.archs.get(chip)):
        return
    usage = {s: int(registers) for s, registers, _ in USAGE.findall(
        cuobjdump("-res-usage", "-arch", arch, path))}  # fmt: skip
    for symbol, readable in zip(usage, demangled(usage), strict=True):
        if match := library.kernel.search(readable):
            rows, cols = int(match["rows"]), int(match["cols"])
            sass = cuobjdump("-sass", "-arch", arch, "-fun", symbol, path)
            tile = Tile(rows * cols, 2 * 2 * rows * cols * 64, 2)
            warps = rows // library.rows
            yield Compiled(
                f"{name}, heads of 64, bfloat16", 0, 0, f"{library.package}, {rows} x {cols}", chip,
                warps + library.loading, usage[symbol], None, 0, *products_and_loads(sass, chip),
                count(sass, chip, warps, tile),
            )  # fmt: skip
            return


def demangled(symbols):
    """C++'s names, without CUTLASS's wrappings of numbers."""
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True,
                          check=True).stdout  # fmt: skip
    text = re.sub(r"\((?:int|bool)\)|cutlass::|cute::|flash::", "", text)
    text = re.sub(r"\bC<(\d+)>", r"\1", text)
    return re.sub(r" +>", ">", text).splitlines()


def liger(chip):
    """Its layer-norm, which has neither a linear layer's bias nor a residual."""
    from liger_kernel.ops.layer_norm import layer_norm_forward

    work = works.LayerNorm(torch.bfloat16, "meta", rows=16384, width=768)
    x = torch.empty(work.rows, work.width, dtype=work.dtype, device="meta")
    with recorded(chip) as launches:
        layer_norm_forward(x, x[0], x[0], 1e-12)
    (launch,) = launches
    return compiled_launch(
        launch, chip, f"Liger, layer-norm, {work.rows} x {work.width}, bfloat16", 0,
        2 * x.numel() * x.itemsize, "liger_kernel",
        Tile(work.width, bytes=2 * work.width * work.dtype.itemsize), moved=launch.bytes,
    )  # fmt: skip
