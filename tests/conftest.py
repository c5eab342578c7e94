"""What the tests share: backends and instruction sets to run on, poisoned memory, the allowance."""

import contextlib
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import threading
import zlib

import cuda_host
import numpy as np
import pytest
import torch
from scipy.special import fdtri

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():  # Triton's kernels then run in its interpreter, on CPU tensors
    os.environ["TRITON_INTERPRET"] = "1"
    try:  # and the CUDA kernels are compiled for the CPU
        if "BERT_FAST_CUDA_HOST" not in os.environ:
            module = cuda_host.build(cuda_host.ROOT / "build" / "cuda_host")
            os.environ["BERT_FAST_CUDA_HOST"] = str(module)
        NO_CUDA_HOST = ""
    except cuda_host.Unavailable as reason:
        NO_CUDA_HOST = str(reason)
else:
    NO_CUDA_HOST = "this machine has a GPU: there it is cuda-gpu"

import bert_fast
from bert_fast import _C, backends

# A test that asks for a backend by the environment says so itself.
os.environ.pop("BERT_FAST_BACKEND", None)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _isas():
    """The instruction sets of the CPU kernels that this processor can run; without AMX, too, where
    that is another."""
    best, found = _C.cpu_isa(), {}
    for isa in ("avx512", "avx512_no_amx", "avx2", "generic"):
        try:
            _C.set_cpu_isa(isa)
        except ValueError:
            continue
        kinds = [_C.linear_kind(precision) for precision in range(3)]
        if kinds not in found.values():
            found[isa] = kinds
    _C.set_cpu_isa(best)
    return [*found]


ISAS = _isas()
HAS_GPU, HAS_TRITON = torch.cuda.is_available(), importlib.util.find_spec("triton") is not None
TRITON = [
    pytest.param("triton", marks=pytest.mark.skipif(
        HAS_GPU, reason="interpreted, and this machine has a GPU: there it is triton-cuda")),
    pytest.param("triton-cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
        not HAS_GPU, reason="needs an NVIDIA GPU; its interpreted twin ran without one")]),
] if HAS_TRITON else []  # fmt: skip

# The backends that take CPU tensors here: on drawn inputs all of them are compared.
KERNELS = [
    name for name in backends.SUPPORT
    if backends.why_not(name, "gelu", "cpu", torch.float32, needs_grad=True) is None
]  # fmt: skip
NO_GPU = backends.why_unavailable("cuda") if HAS_GPU else "none here"
CUDA = [
    pytest.param("cuda-host", marks=pytest.mark.skipif(
        bool(NO_CUDA_HOST), reason=f"the CUDA kernels are not run on the CPU: {NO_CUDA_HOST}")),
    pytest.param("cuda-gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(
        NO_GPU is not None, reason=f"needs an NVIDIA GPU: {NO_GPU}; its host twin ran without")]),
]  # fmt: skip


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
        not HAS_GPU, reason="needs an NVIDIA GPU; the same test ran on the CPU")]),
]  # fmt: skip


@pytest.fixture(params=DEVICES)
def device(request):
    """Where whole models are computed, by ``auto``."""
    return request.param


@pytest.fixture(params=["eager", *(f"cpu-{isa}" for isa in ISAS), *TRITON, *CUDA])
def backend(request):
    """Every backend: C++ in each instruction set, Triton interpreted, CUDA compiled for the CPU; or
    both on a GPU, where all the test's tensors then are."""
    name, _, variant = request.param.partition("-")
    best = _C.cpu_isa()
    if name == "cpu":
        _C.set_cpu_isa(variant)
    on = torch.device("cuda") if variant in ("cuda", "gpu") else contextlib.nullcontext()
    with bert_fast.use_backend(name), on:
        yield name
    _C.set_cpu_isa(best)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, so an output that a kernel does not write cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def _commit():
    """Of a tree without changes; None of another one, and where git does not answer."""

    def said(*command):
        command = ["git", "-C", str(cuda_host.ROOT), *command]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = said("--no-optional-locks", "status", "--porcelain")
        return None if changed else said("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None


COMMIT = _commit()


def seed_of(name, commit=COMMIT):
    """What a test draws from: fresh at every commit and, while there are changes, at every run. One
    commit draws the same everywhere, so that what passed here is what is tested there."""
    if (given := os.environ.get("BERT_FAST_TEST_SEED")) is not None:
        return int(given)
    return torch.seed() % 2**31 if commit is None else zlib.crc32(f"{commit} {name}".encode())


@pytest.fixture(autouse=True)
def fresh_seed(request):
    """Random inputs; the seed is in the report of a test that fails. Where it is no news,
    hypothesis draws by it, too, and not from what failed before."""
    from hypothesis import core

    seed = seed_of(request.node.nodeid)
    known = COMMIT is not None or "BERT_FAST_TEST_SEED" in os.environ
    if known and request.config.getoption("--hypothesis-seed", None) is None:
        core.global_force_seed = seed
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    request.node.add_report_section("setup", "seed", f"BERT_FAST_TEST_SEED={seed}")
    return seed


def assert_within(ours, eager, truth, name="", draws=None):
    """``ours`` errs little more than PyTorch (``eager``) in the same dtype, both measured against
    the float64 ``truth``: an output by a ratio of 2, gradients (further items of a list) by 3, the
    ratios of FlashAttention's own tests. They bound the root mean square, which is itself a draw
    where it is taken over few numbers: n of them widen it by 1 + 3 / sqrt(n), and very few by what
    two such draws of the same errors differ by once in 100,000 (the F distribution); ``draws``: how
    many of the numbers err by themselves, as the rows of an attention do, each of whose elements
    errs as the row's sum of exponentials does. The largest
    error, a single draw at any n, gets twice the ratio. PyTorch's error counts as one rounding at
    least: on a lone key, say, its softmax is exact by chance."""
    if isinstance(ours, torch.Tensor):
        ours, eager, truth = [ours], [eager], [truth]
    for i, (o, e, t) in enumerate(zip(ours, eager, truth, strict=True)):
        _assert_within(o, e, t, 2 if i == 0 else 3, f"{name}[{i}]", draws or t.numel())


def assert_gradients_within(ours, eager, truth):
    """The same of a model's gradients, {parameter: gradient}, all together, each by its own size:
    of one alone few numbers err by themselves. Without those of keys' biases, which are zero in
    exact arithmetic: softmax ignores them."""
    names = [n for n in truth if not n.endswith(("key.bias", "k_lin.bias", "attn.k.bias"))]
    sizes = [_rms(truth[n]) or 1.0 for n in names]

    def together(of):
        parts = (of[n].double().flatten() / size for n, size in zip(names, sizes, strict=True))
        return [torch.zeros(0).double(), torch.cat([*parts])]

    assert ours.keys() == eager.keys() == truth.keys()
    assert_within(together(ours), together(eager), together(truth), name="gradients")


def _assert_within(ours, eager, truth, ratio, name, n):
    assert ours.shape == truth.shape, f"{name}: {ours.shape} != {truth.shape}"
    assert ours.dtype == eager.dtype, f"{name}: {ours.dtype} != {eager.dtype}"
    infinite = truth.isinf()
    assert torch.equal(ours.isinf(), infinite), f"{name}: infinities differ"
    if truth.numel() == 0:
        return
    eps = torch.finfo(ours.dtype).eps
    ours, eager, truth = (t.double().masked_fill(infinite, 0) for t in (ours, eager, truth))
    few = max(ratio * (1 + 3 / math.sqrt(n)), math.sqrt(fdtri(n, n, 1 - 1e-5)))
    for norm, what, factor in ((_rms, "rms", few), (_largest, "largest", max(2 * ratio, few))):
        error, allowed, floor = norm(ours - truth), norm(eager - truth), eps * norm(truth)
        assert error <= factor * max(allowed, floor), (
            f"{name}: {what} error {error:.3e}, PyTorch's {allowed:.3e}, one rounding {floor:.3e}"
        )


def _rms(x):
    return x.square().mean().sqrt().item()


def _largest(x):
    return x.abs().max().item()


def run_with_gradients(function, inputs, dout, dtype):
    """Runs function(*inputs) and its backward; returns output and gradients, detached."""
    inputs = [None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs]
    out = function(*inputs)
    wanted = [t for t in inputs if t is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, dout.to(out.dtype))]


@pytest.fixture
def gradients():
    return run_with_gradients


def compiling(*command, cwd=cuda_host.ROOT, without=()):
    """Runs Python where Triton compiles: the tests' own process interprets."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", *without)}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, check=False,
        env=env | {"PYTHONPATH": str(cwd)},
    )  # fmt: skip


def json_of(answer):
    """What such a Python printed."""
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout)


@contextlib.contextmanager
def torch_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """Of torch's: beside busy processes two wait for each other."""
    with torch_threads(1):
        yield


@pytest.fixture
def two_threads():
    with torch_threads(2):
        yield


def in_threads(count, call):
    """All that call(), a list, gives in so many threads that begin together."""
    found, start = [], threading.Barrier(count)

    def work():
        start.wait()
        found.extend(call())

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def some_of(faults):
    """Of planted faults every fifth, so that CI has time for them; where the environment's
    BERT_FAST_FAULTS is "all", all of them, which takes two cores three quarters of an hour."""
    return list(faults)[:: 1 if os.environ.get("BERT_FAST_FAULTS") == "all" else 5]


def cu_seqlens(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()] if lengths else [0]).int()


def same_bits_at_any_thread_count(run):
    """Asserts that run(), a tuple of tensors, gives the same bits on 1, 2, 3 and 2 threads."""
    results = []
    for count in (1, 2, 3, 2):
        with torch_threads(count):
            results.append(run())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def attention(monkeypatch):
    """How often our attention ran, alone or in a model's one call; and warnings are said anew."""
    from bert_fast import ops
    from bert_fast.backends import cpu
    from bert_fast.hugging_face import families

    families.warn_once.cache_clear()
    calls = []

    def counted(real):
        def count(*args, **kwargs):
            calls.append(1)
            return real(*args, **kwargs)

        return count

    monkeypatch.setattr(ops, "attention", counted(ops.attention))
    monkeypatch.setattr(cpu.Encoder, "forward", counted(cpu.Encoder.forward))
    return calls
