"""The attention of Triton's own tutorial, 06-fused-attention.py, counted. No wheel has that file:
who wants the count has it, from a checkout of Triton as old as the Triton that is installed."""

import contextvars
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from unittest import mock

import torch

from bert_fast.bench import works
from bert_fast.inspect import tiles
from bert_fast.inspect.counts import Tile
from bert_fast.inspect.grid import of_work
from bert_fast.inspect.kernels import compiled_launch
from bert_fast.inspect.recording import pretended, recorded
from bert_fast.inspect.sass import leanest

LENGTHS = (512,) * 32  # it has no ragged batches; its loop is the same for every length


def tutorial(path, chip):
    """:class:`Compiled` of its forward and its backward, of heads of 64 in float16, which is all
    that it has: of the tiles that it tries the leanest. The file is loaded, so its top level runs,
    but not its benchmark.

    Raises:
        ValueError: ``path`` is not that file, or one of another Triton.
    """
    from triton.compiler.errors import CompilationError, CompileTimeAssertionFailure
    from triton.runtime.errors import PTXASError

    if not Path(path).is_file():
        raise ValueError(f"--tutorial: {path} is no file")
    # What it sets for all of Triton, an allocator, stays in there.
    launches = contextvars.copy_context().run(_launches, path, chip)
    for name, counted in (("_attn_fwd", _forward), ("_attn_bwd", _backward)):
        tried, refused = [], None
        for launch in (x for x in launches if x.kernel.__name__ == name):
            try:
                tried.append(counted(launch, chip))
            except (CompileTimeAssertionFailure, PTXASError) as error:
                refused = error  # Triton's tuning passes such a size over, too
            except (KeyError, CompilationError, RuntimeError) as error:
                said = f"{type(error).__name__}: {error}"
                raise ValueError(f"--tutorial: {path}: {name} on {chip}: {said}") from error
        if not tried:
            why = f": none of its sizes compiles: {refused}" if refused else ""
            raise ValueError(f"--tutorial: {path} launches no {name} for {chip}{why}") from refused
        best = leanest(tried)
        if 0 < best.counts.executed != best.counts.tile.flops:
            raise ValueError(f"--tutorial: {path}: not all products of {name} are in its loops")
        yield best


def _launches(path, chip):
    """What it launches for one batch, forward and backward."""
    shape = len(LENGTHS), works.Attention.num_heads, LENGTHS[0], works.Attention.head_dim
    q, k, v = torch.empty(3, *shape, dtype=torch.float16, device="meta").requires_grad_()
    loader = importlib.machinery.SourceFileLoader("tutorial", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("tutorial", loader))
    try:
        with (
            mock.patch.object(sys, "dont_write_bytecode", True),
            pretended(chip), recorded(chip) as launches,
        ):  # fmt: skip
            loader.exec_module(module)
            out = module.attention(q, k, v, False, shape[-1] ** -0.5, False)
            out.backward(torch.empty_like(out))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a wrong file does; exits and pytest's skips, too
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"--tutorial: {path} does not run as Triton's tutorial: {said}") from error
    return launches


def _forward(launch, chip):
    work = works.Attention(torch.float16, "meta", lengths=LENGTHS)
    sizes = dict(launch.constants)
    sizes["BLOCK_D"] = sizes["HEAD_DIM"]
    tile = tiles.of_launch("attention.forward", sizes, work)
    shown = f"{sizes['BLOCK_M']} x {sizes['BLOCK_N']}, {launch.num_stages} stages"
    grid = of_work(work, "attention.forward", tile, sizes, chip, launch.ctas)
    return _compiled(launch, chip, work, shown, tile, grid)


def _backward(launch, chip):
    """One kernel of two loops: keys with four products, then queries with three."""
    work = works.Attention(torch.float16, "meta", backward=True, lengths=LENGTHS)
    sizes = dict(launch.constants)
    keys, queries = ((sizes[f"BLOCK_M{n}"], sizes[f"BLOCK_N{n}"]) for n in (1, 2))
    elements = keys[0] * keys[1]
    if elements != queries[0] * queries[1]:
        raise ValueError(f"--tutorial: its backward's tiles, {keys} and {queries}, differ in size")
    tile = Tile(elements, 2 * 7 * elements * work.head_dim, 7, loops=2)
    shown = f"{keys[0]} x {keys[1]} and {queries[0]} x {queries[1]}, {launch.num_stages} stages"
    return _compiled(launch, chip, work, shown, tile)


def _compiled(launch, chip, work, shown, tile, grid=None):
    return compiled_launch(
        launch, chip, f"Triton's tutorial, {work}", work.flops, work.num_bytes,
        f"tutorial, {shown}", tile, grid, launch.bytes,
    )  # fmt: skip
