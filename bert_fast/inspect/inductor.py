"""What torch's Inductor writes for layer-norm and GELU, counted. It asks torch for the GPU that it
writes for, and remembers the answer: so each chip has a process of its own, in which there is one.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import re

import torch

from bert_fast.bench import works
from bert_fast.inspect import tiles
from bert_fast.inspect.kernels import compiled_launch
from bert_fast.inspect.recording import Launch, pretended
from bert_fast.inspect.sass import leanest

KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", re.DOTALL)


class NotWritten(Exception):
    """Why this torch's Inductor has no kernels to count."""


def inductor(chip):
    """[:class:`Compiled`] of inference's layer-norm and GELU, in bfloat16: of the sizes that
    Inductor would try, the leanest."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(compiled, chip).result()


def compiled(chip):
    """The same, in this process, which is no good for anything else afterwards."""
    for name in [n for n in os.environ if n.startswith("TORCHINDUCTOR_")]:
        if name != "TORCHINDUCTOR_CACHE_DIR":
            del os.environ[name]  # what it does by default is counted
    norm = works.LayerNorm(torch.bfloat16, "meta", rows=16384, width=768)
    gelu = works.Gelu(torch.bfloat16, "meta", rows=16384, width=3072)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(pretended(chip))
            kernels = [_kernel(norm, _layer_norm, 2, 3), _kernel(gelu, _gelu, 1, 1)]
        except Exception as error:  # none of what is used is public, or the same in each torch
            said = f"{type(error).__name__}: {error}"
            raise NotWritten(
                f"torch {torch.__version__} does not give its kernels: {said}"
            ) from error
        return [_counted(norm, kernels[0], norm.width, chip), _counted(gelu, kernels[1], 1, chip)]


def _layer_norm(x, residual, bias, weight, norm_bias):
    normalized = torch.nn.functional.layer_norm
    return normalized(x + bias + residual, weight.shape, weight, norm_bias, 1e-12)


def _gelu(x, bias):
    return torch.nn.functional.gelu(x + bias)


def _kernel(work, function, matrices, vectors):
    """The one kernel of a function of so many matrices, and then vectors. XBLOCK, of rows or of
    numbers, is its one size: of others nobody here would know what they count."""
    shapes = [(work.rows, work.width)] * matrices + [(work.width,)] * vectors
    (kernel,) = _kernels(function, shapes, work.dtype)
    for config in kernel.configs:
        if (sizes := {*config.kwargs} & {*kernel.fn.arg_names}) != {"XBLOCK"}:
            raise ValueError(f"{kernel.fn.__name__} has the sizes {sorted(sizes)}")
    return kernel


def _counted(work, kernel, block, chip):
    """Of a kernel of which XBLOCK counts blocks of so many numbers."""
    meta = kernel.triton_meta
    found = []
    for config in kernel.configs:
        size = config.kwargs["XBLOCK"]
        launch = Launch(
            kernel.fn, tuple(meta["signature"].items()),
            tuple((meta["constants"] | {"XBLOCK": size}).items()),
            tuple(i for (i,) in meta["configs"][0]), config.num_warps, config.num_stages,
            config.maxnreg, debug=False, enable_fp_fusion=meta.get("enable_fp_fusion"), ctas=0,
            bytes=0,
        )  # fmt: skip
        found.append(
            compiled_launch(
                launch, chip, f"torch's Inductor, {work}", work.flops, work.num_bytes,
                f"{kernel.fn.__name__}, {size}", tiles.rows_of(size * block, work),
            )
        )  # fmt: skip
    return leanest(found)


def _kernels(function, shapes, dtype):
    """The kernels that Inductor writes for the function, not compiled."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode() as fake, torch.no_grad():
        inputs = [torch.empty(shape, dtype=dtype, device="cuda:0") for shape in shapes]
        traced = make_fx(function, select_decomp_table())(*inputs)
    graph = GraphLowering(traced, is_inference=True)
    with (
        V.set_fake_mode(fake), tracing(TracingContext(fake)), V.set_graph_handler(graph),
        V.set_debug_handler(DebugContext()),
    ):  # fmt: skip
        graph.run(*inputs)
        written, _ = graph.codegen()
    triton_helpers.set_driver_to_gpu = lambda: None  # the pretended one is, and this process's
    sources = KERNEL.findall(written.value)
    return [getattr(PyCodeCache.load(source), name) for name, source in sources]
