"""Which kernels run: four backends, a table of what ``auto`` prefers, three ways to override it.

====== ========================== ==========================================================
name   what it is                 runs
====== ========================== ==========================================================
eager  bert_fast/ops/reference.py     anywhere, every dtype; always there
cpu    csrc/cpu (C++)             CPU tensors: float32, bfloat16, float16
triton kernels/                   CUDA tensors; with TRITON_INTERPRET=1, CPU tensors, slowly
cuda   csrc/cuda (CUDA C++)       CUDA tensors; with BERT_FAST_CUDA_HOST, CPU tensors, slowly
====== ========================== ==========================================================
"""

import contextlib
import contextvars
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch

from bert_fast.environment import stored
from bert_fast.extras import missing

BackendName = Literal["auto", "eager", "cpu", "triton", "cuda"]
LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Support:
    """What one backend does for one op."""

    device: str
    dtypes: tuple = LOW_PRECISION
    backward: bool = True
    largest: float = float("inf")  # head_dim of attention, the last dimension of others
    largest_before_80: float = float("inf")  # on chips of compute capability 7.5
    since: tuple = (0, 0)  # the first compute capability that has what the op needs


_chosen: dict[tuple, str] = {}  # a call of choose -> what it returned
_alike: dict[tuple, bool] = {}  # the same of all_choose


_tables = object()  # another one with each change of a table


class _Table(dict):
    """What choices rest on: when it changes, they are made anew."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        _forget_choices()

    def __delitem__(self, key):
        super().__delitem__(key)
        _forget_choices()


def _forget_choices():
    global _tables
    _tables = object()
    _chosen.clear()
    _alike.clear()


OPS = ("attention", "layer_norm", "gelu")
# What is otherwise done by other ops, one after another, on whatever backends those choose.
COMPOSED = ("linear_gelu", "embedding_layer_norm", "float8")
SUPPORT = _Table({
    "cpu": {op: Support("cpu") for op in (*OPS, "embedding_layer_norm")},
    "triton": {
        "attention": Support("cuda", largest=256, largest_before_80=128),
        "layer_norm": Support("cuda", largest=16384),
        "gelu": Support("cuda"),
        "linear_gelu": Support("cuda"),
        "embedding_layer_norm": Support("cuda", largest=16384),
        "float8": Support("cuda", backward=False, largest=16384, since=(8, 9)),
    },
    "cuda": {
        "attention": Support("cuda", largest=256, largest_before_80=128),
        "layer_norm": Support("cuda", largest=8192),
        "gelu": Support("cuda"),
    },
})  # fmt: skip
BACKENDS = ("eager", *SUPPORT)
MODULES = {
    "cpu": "bert_fast.backends.cpu",
    "triton": "bert_fast.kernels",
    "cuda": "bert_fast.backends.cuda",
}

# What `auto` tries, in order, by the tensors' device: Triton before CUDA C++ (an H100 has
# measured it: benchmarks/results/h100), by rule on other chips, too; but on compute capability 7.5,
# where Triton has no tensor-core path, the other way round.
AUTO = _Table({"cpu": ("cpu", "eager"), "cuda": ("triton", "cuda", "eager")})
# Ops that `auto` leaves alone but on these compute capabilities, each with the measurement that put
# it there. linear_gelu has to beat cuBLAS followed by gelu, and no chip has been measured.
ONLY_WHERE_MEASURED: dict[str, dict[tuple[int, int], str]] = _Table({"linear_gelu": {}})

_override = contextvars.ContextVar("bert_fast_backend", default=None)
# name -> module, or the reason why there is none
_modules: dict[str, ModuleType | str] = _Table()
_environment = tuple(
    stored(name) for name in ("BERT_FAST_BACKEND", "TRITON_INTERPRET", "BERT_FAST_CUDA_HOST")
)


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run here; the message says why."""


def _load(name):
    if name not in _modules:
        _modules[name] = _try_load(name)
    return _modules[name]


def import_module(name):
    """A backend's module, whether or not it can run here."""
    return importlib.import_module(MODULES[name])


def _try_load(name):
    try:
        from bert_fast import _C
    except ImportError as error:
        if name in ("cpu", "cuda"):
            return f"the compiled extension bert_fast._C does not import ({error})"
    if name == "triton" and (reason := missing("triton")) is not None:
        return reason
    if interpreted(name):
        return import_module(name)
    if name == "cuda" and _C.cuda_archs is None:
        return "bert_fast was built without CUDA (no nvcc was found; build with BERT_FAST_CUDA=on)"
    if name == "cuda" and (reason := _old_driver(*_C.cuda_versions())):
        return reason
    if name in ("cuda", "triton") and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return import_module(name)


def _old_driver(driver, built):
    """Why the NVIDIA driver cannot run the extension, or None. Both are CUDA versions, 1000 * major
    + 10 * minor; ``driver`` is 0 where there is none. Within a major version any driver runs a
    chip's own code; PTX may need a newer one, which CUDA says when it loads a kernel."""
    if driver == 0 or driver // 1000 >= built // 1000:
        return None
    driver, built = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, built))
    return (
        f"the NVIDIA driver runs CUDA up to {driver}, and bert_fast was built with CUDA {built}: "
        "update the driver, or build bert_fast with the driver's CUDA"
    )


def interpreted(name):
    """Whether the backend's kernels run on CPU tensors: in Triton's interpreter, or compiled for
    the CPU (csrc/host)."""
    if name == "cuda":
        return bool(os.environ.get("BERT_FAST_CUDA_HOST"))
    return name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def why_unavailable(name: str) -> str | None:
    """Why the backend cannot run on this machine at all, or None where it can."""
    if name == "eager":
        return None
    found = _load(name)
    return found if isinstance(found, str) else None


def why_not(name, op, device, dtype, needs_grad, size=0):
    """Why the backend cannot run this call, or None where it can; as :func:`choose` takes them."""
    if name == "eager":
        return None
    device = torch.device(device)
    if (reason := why_unavailable(name)) is not None:
        return reason
    support = SUPPORT[name].get(op)
    if support is None:
        return f"it has no {op} kernel"
    wanted = "cpu" if interpreted(name) else support.device
    if device.type != wanted:
        return f"it runs on {wanted} tensors, and these are on {device.type}"
    if dtype not in support.dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in support.dtypes)
        return f"its {op} takes {known}, not {str(dtype).removeprefix('torch.')}"
    if needs_grad and not support.backward:
        return f"its {op} has no backward yet"
    if device.type == "cuda" and _capability(device) < support.since:
        return f"its {op} is for compute capability {'.'.join(map(str, support.since))} and later"
    largest = support.largest
    if size > support.largest_before_80 and _capability(device) < (8, 0):
        largest = support.largest_before_80
    if size > largest:
        what = "head_dim" if op == "attention" else "a last dimension"
        return f"its {op} takes {what} up to {largest}, not {size}"
    return None


def check_name(name, source):
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"{source} must be one of auto, {', '.join(BACKENDS)}, not {name!r}")
    return name


def choose(op, device, dtype, needs_grad, backend=None, size=0):
    """The backend's name for one call. An argument beats :func:`use_backend`, which beats the
    environment's BERT_FAST_BACKEND, which beats the table ``AUTO``. ``device`` is the tensors' own,
    which need not be the current one, or its type. ``size`` is attention's head_dim, layer_norm's
    last dimension. Of an op in ``COMPOSED``, "eager" means: call the others.

    Raises:
        BackendUnavailableError: a backend was asked for by name and cannot run this call.
    """
    key = op, device, dtype, needs_grad, backend, size, *circumstances()
    known = type(size) is int  # not a symbol of a traced shape
    if known and (name := _chosen.get(key)) is not None:
        return name
    device = torch.device(device)
    name = _choose(op, device, dtype, needs_grad, backend, size)
    if known and (device.type != "cuda" or device.index is not None):  # cuda: any may be current
        _chosen[key] = name
    return name


def all_choose(name, ops, device, dtype):
    """Whether each of these ops, in inference, chooses this backend."""
    key = name, ops, device, dtype, *circumstances()
    if (found := _alike.get(key)) is None:
        try:
            found = all(choose(op, device, dtype, needs_grad=False) == name for op in ops)
        except BackendUnavailableError:  # of whom another was asked for: the ops say it
            found = False
        _alike[key] = found
    return found


def circumstances():
    """All that a choice depends on, but what it is made for."""
    asked, interprets, host = _environment
    of_torch = torch.cuda.get_device_capability
    return _override.get(), asked(), interprets(), host(), why_not, of_torch, _tables


def _choose(op, device, dtype, needs_grad, backend, size):
    if backend is not None:
        check_name(backend, "backend")
    name = backend or _override.get()
    if name is None:
        name = os.environ.get("BERT_FAST_BACKEND") or "auto"
        check_name(name, "the environment variable BERT_FAST_BACKEND")
    if name != "auto":
        if op in COMPOSED and op not in SUPPORT.get(name, ()):
            return "eager"
        if (reason := why_not(name, op, device, dtype, needs_grad, size)) is not None:
            raise BackendUnavailableError(f"backend {name!r} cannot run {op} here: {reason}")
        return name
    if op in ONLY_WHERE_MEASURED and _capability(device) not in ONLY_WHERE_MEASURED[op]:
        return "eager"
    order = AUTO.get(device.type, ())
    if _capability(device) < (8, 0):
        order = ("cuda", "triton", "eager")
    for name in order:
        if why_not(name, op, device, dtype, needs_grad, size) is None:
            return name
    return "eager"


def _capability(device):
    """Of that GPU, or of the current one where no number is said; a recent one's where there is
    none."""
    if device.type != "cuda" or not torch.cuda.is_available():  # not there: a fake tensor's
        return 8, 0
    return torch.cuda.get_device_capability(*() if device.index is None else (device,))


# A traced graph keeps the backend it was traced with. This is what the decorator
# torch.compiler.assume_constant_result sets; the decorator imports all of Dynamo, 0.8 s, at once.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def module(name):
    """The loaded module of a backend that :func:`choose` returned."""
    return _load(name)


def resolve_device(name: str) -> str:
    """``auto`` is the GPU where there is one, else the CPU.

    Raises:
        ValueError: a GPU is asked for, and PyTorch finds none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name}: torch sees no CUDA device")
    return name


@contextlib.contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """``with use_backend("eager"): ...`` runs every op inside on that backend."""
    token = _override.set(check_name(name, "use_backend"))
    try:
        yield
    finally:
        _override.reset(token)
