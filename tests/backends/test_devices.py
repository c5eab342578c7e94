"""Launches on the tensors' own device and stream: on a stand-in for a machine of two GPUs, whose
tensors say that they are on the second, and on two GPUs where there are two."""

import importlib.util
import json

import pytest
import torch
from conftest import compiling, json_of
from torch._subclasses.fake_tensor import FakeTensorMode

import bert_fast
from bert_fast import ops

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
needs_two = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs; a stand-in for them ran"
)

# A tensor says that it is on cuda:1; memory asked for there is the CPU's; torch.cuda plays along.
STAND_IN = """
import contextlib, json, threading
import torch
from torch.overrides import TorchFunctionMode

class OnSecond(torch.Tensor):
    @property
    def device(self):
        return torch.device("cuda", 1)

class Memory(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = "cpu"
            return function(*args, **kwargs).as_subclass(OnSecond)
        return function(*args, **kwargs)

class Threads(threading.local):
    device = 0
now, asked = Threads(), []

@contextlib.contextmanager
def device(wanted):
    before, now.device = now.device, torch.device(wanted).index
    try:
        yield
    finally:
        now.device = before

torch.cuda.device, torch.cuda.current_device = device, lambda: now.device
class Properties:
    multi_processor_count = 132
class Stream:
    def __init__(self, device):
        self.cuda_stream = 1000 + torch.device(device).index
def properties(device):
    asked.append(torch.device(device).index)
    return Properties()
def capability(device):
    asked.append(torch.device(device).index)
    return 9, 0
torch.cuda.get_device_properties, torch.cuda.get_device_capability = properties, capability
torch.cuda.current_stream = Stream
Memory().__enter__()

def gpu(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="cuda:1")

def calls(backend):
    vector, seed = gpu(64, dtype=torch.float32), gpu(1, dtype=torch.int64)
    cu, qkv, x = gpu(3, dtype=torch.int32), gpu(9, 3, 2, 32), gpu(9, 64)
    q, k, v = (t.as_subclass(OnSecond) for t in qkv.unbind(1))
    lse, row = gpu(2, 9, dtype=torch.float32), gpu(9, dtype=torch.float32)
    options = cu, cu, 999, 999, None, 0.125, False, 0.1, seed  # the lengths have kernels of theirs
    yield backend.attention_forward, (q, k, v, *options)
    yield backend.attention_backward, (q, q, k, v, q, lse, *options, q, k, v)
    yield backend.layer_norm_forward, (x, vector, vector, x, vector, 1e-12, 0.1, seed)
    yield backend.layer_norm_backward, (x, x, row, row, vector, True, 0.1, seed)
    yield backend.gelu_forward, (x, vector, "none")
    yield backend.gelu_backward, (x, x, vector, "none")
    yield backend.sums_of, (lse[None], lse[None])
    if hasattr(backend, "linear_gelu_forward"):
        yield backend.linear_gelu_forward, (x, gpu(64, 64), vector, "none", True)
        yield backend.column_partials, (x,)
        ids, table = gpu(9, dtype=torch.int64), gpu(9, 64)
        yield backend.embedding_forward, (
            ids, ids, ids, table, table, table, vector, vector, 1e-12, x.dtype, True)

launched = []
def run_all(backend):
    for function, arguments in calls(backend):
        before = len(launched)
        function(*arguments)
        assert len(launched) > before, function
        assert now.device == 0, "what was current before is so again"

def in_thread(backend):  # which has no device of its own yet
    def run():
        with Memory():
            run_all(backend)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
"""


def stood_in(script):
    """What the script prints as JSON, beside the stand-in; where Triton compiles."""
    return json_of(compiling("-c", STAND_IN + script, without=["BERT_FAST_BACKEND"]))


TRITON = """
from triton.runtime.jit import JITFunction
from bert_fast import kernels

broken = None
def run(kernel, *args, grid, warmup=False, **options):
    if broken is not None:
        raise broken
    launched.append((kernel.__name__, now.device, options.get("enable_fp_fusion")))
JITFunction.run = run
run_all(kernels)
in_thread(kernels)

from triton.runtime.errors import OutOfResources
said = []
for broken in (OutOfResources(300_000, 232_448, "shared memory"),
               RuntimeError("Triton Error [CUDA]: invalid argument"),
               torch.OutOfMemoryError("no memory is left"), RuntimeError("of an earlier kernel")):
    for function, arguments in calls(kernels):
        try:
            function(*arguments)
        except RuntimeError as error:
            said.append((function.__name__, type(error).__name__, str(error)))
        assert now.device == 0
broken = None
before = len(launched)
run_all(kernels)
again = len(launched) - before
with device("cuda:1"):
    entered = []
    torch.cuda.device = entered.append  # nothing to do: where it is current, none is made
    for function, arguments in calls(kernels):
        function(*arguments)
        assert now.device == 1 and not entered
print(json.dumps([launched, sorted(set(asked)), said, again]))
"""


@needs_triton
def test_triton_launches_on_the_tensors_device():
    """The one GPU kernel launch after another, from the main thread and from a fresh one; and what
    is said when one fails."""
    launched, asked, said, again = stood_in(TRITON)
    kernels = {name for name, *_ in launched}
    assert kernels >= {"_forward", "_backward", "_backward_q", "_backward_kv"}
    assert "sum_partials" in kernels
    assert {device for _, device, _ in launched} == {1}
    assert all(fused is True for *_, fused in launched)
    assert asked == [1]  # capability and processors, too
    assert again == len(launched) / 4  # after errors everything is launched as before
    assert len(said) == 4 * 10
    for function, kind, message in said[:20]:
        assert kind == "RuntimeError"
        assert message.startswith(f"triton_{function} (")
        given = "kinds (1, 2, 9) float32, kinds (1," if function == "sums_of" else "bfloat16"
        assert given in message
        assert ") on cuda:1: " in message
        assert ("Hardware limit: 232448" in message) != ("invalid argument" in message)
    q = "q (9, 2, 32) bfloat16, k (9, 2, 32) bfloat16, v (9, 2, 32) bfloat16, cu_q (3,) int32"
    assert q in said[0][2]
    assert {tuple(s[1:]) for s in said[20:]} == {
        ("OutOfMemoryError", "no memory is left"), ("RuntimeError", "of an earlier kernel")
    }  # fmt: skip


CUDA = """
from bert_fast.backends import cuda

class Kernels:
    AttentionShape, SUM_COLUMNS = dict, 32
    def cuda_attention_scratch(self, shape, call):  # launches nothing
        return 9
    def __getattr__(self, name):
        return lambda *given, **_: launched.append((name, now.device, given[-1][:2]))
cuda._kernels = Kernels()
run_all(cuda)
in_thread(cuda)
print(json.dumps([launched, sorted(set(asked))]))
"""


def test_cuda_launches_on_the_tensors_device():
    launched, asked = stood_in(CUDA)
    assert len(launched) == 2 * 9  # a backward's sums are one more
    assert all(tuple(launch[1:]) == (1, [1, 1001]) for launch in launched)
    assert asked == [1]


def on(index, *shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=torch.device("cuda", index))


KINDS = {
    "attention": {
        "q": (9, 2, 8), "k": (9, 2, 8), "v": (9, 2, 8), "cu_seqlens": (3, torch.int32),
        "bias": (3, 2, 8), "position_bias": (2, 9, 9), "seed": (1, torch.int64),
    },
    "layer_norm": {
        "x": (9, 8), "weight": (8,), "bias": (8,), "residual": (9, 8), "linear_bias": (8,),
        "seed": (1, torch.int64), "out": (9, 8),
    },
    "gelu": {"x": (9, 8), "bias": (8,), "out": (9, 8)},
    "linear_gelu": {"x": (9, 8), "weight": (6, 8), "bias": (6,), "out": (9, 6)},
    "embedding_layer_norm": {
        "word": (9, 8), "input_ids": (9, torch.int64), "position_ids": (9, torch.int64),
        "token_type_ids": (9, torch.int64), "position": (9, 8), "token_type": (9, 8),
        "weight": (8,), "bias": (8,),
    },
}  # fmt: skip


@pytest.mark.parametrize(("op", "name"), [(o, n) for o, k in KINDS.items() for n in [*k][1:]])
def test_a_tensor_on_another_device_is_refused_by_name(op, name):
    with FakeTensorMode():
        given = {}
        for argument, shape in KINDS[op].items():
            dtype = shape[-1] if isinstance(shape[-1], torch.dtype) else torch.float32
            shape = [n for n in shape if isinstance(n, int)]
            device = torch.device("cuda", int(argument == name))
            given[argument] = torch.empty(shape, dtype=dtype, device=device)
        if "seed" in given:
            given["dropout_p"] = 0.1
        with pytest.raises(ValueError, match=rf"^{name} .*on cuda") as error:
            getattr(ops, op)(**given)
    assert "cuda:0" in str(error.value)
    assert "cuda:1" in str(error.value)


class Listed(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ops.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, None])
def test_a_seed_is_made_on_the_device(seed):
    """Not copied to it, which would wait and could not be captured."""
    from bert_fast.ops import checks

    with FakeTensorMode(), Listed() as listed:
        found = checks.check_dropout(0.1, seed, torch.device("cuda", 1))
    assert (found.device, found.dtype, found.shape) == (torch.device("cuda", 1), torch.int64, (1,))
    assert len(listed.ops) == 1
    assert listed.ops[0].startswith("aten.randint." if seed is None else "aten.full.")
    if seed is not None:
        assert checks.check_dropout(0.1, seed, torch.device("cpu")).tolist() == [seed]


TF32 = """
import json, os, sys
import torch
from bert_fast.kernels.common import precision
matmul, found = torch.backends.cuda.matmul, []
for said in json.loads(sys.argv[1]):
    read, write = os.pipe()
    if not (child := os.fork()):  # each in a process that nothing was said in before
        for statement in said:
            exec(statement)
        os.write(write, precision().encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    found.append(os.read(read, 9).decode())
print(json.dumps(found))
"""
OLD = [
    ([], "ieee"),
    (["matmul.allow_tf32 = True"], "tf32"),
    (["torch.set_float32_matmul_precision('high')"], "tf32"),
    (["torch.set_float32_matmul_precision('medium')"], "tf32"),
    (["torch.set_float32_matmul_precision('high')", "matmul.allow_tf32 = False"], "ieee"),
    (["matmul.allow_tf32 = True", "torch.set_float32_matmul_precision('highest')"], "ieee"),
]
NEW = [  # torch 2.9; after these, reading allow_tf32 raises
    (["matmul.fp32_precision = 'tf32'"], "tf32"),
    (["torch.backends.fp32_precision = 'tf32'"], "tf32"),
    (["torch.backends.fp32_precision = 'tf32'", "matmul.fp32_precision = 'ieee'"], "ieee"),
    (["matmul.allow_tf32 = True", "matmul.fp32_precision = 'ieee'"], "ieee"),
    (["matmul.allow_tf32 = False", "matmul.fp32_precision = 'tf32'"], "tf32"),
    (["torch.backends.cudnn.conv.fp32_precision = 'tf32'"], "ieee"),  # convolutions' alone
]


@needs_triton
def test_tf32_is_what_any_of_torchs_ways_says():
    cases = OLD + (NEW if hasattr(torch.backends.cuda.matmul, "fp32_precision") else [])
    found = json_of(compiling("-c", TF32, json.dumps([said for said, _ in cases])))
    assert dict(zip(map(str, cases), found, strict=True)) == {str(c): c[1] for c in cases}


@needs_two
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_model_on_the_second_gpu(name):
    """While the first is current, on a stream of its own; as the same model does on the first."""
    if reason := bert_fast.backends.why_unavailable(name):
        pytest.skip(reason)
    config = bert_fast.BertConfig(vocab_size=50, hidden_size=64, num_attention_heads=1)
    model = bert_fast.BertModel(config).eval()
    ids = torch.randint(1, 50, (4, 40))
    mask = (torch.arange(40) < torch.tensor([40, 3, 0, 17])[:, None]).long()
    found, gradients = [], []
    for index in range(2):
        here = model.to(f"cuda:{index}")
        here.zero_grad()
        with bert_fast.use_backend(name), torch.cuda.stream(torch.cuda.Stream(index)):
            assert torch.cuda.current_device() == index
            torch.cuda.set_device(0)
            out = here(ids.to(f"cuda:{index}"), mask).last_hidden_state
            out.square().sum().backward()
            assert torch.cuda.current_device() == 0
        torch.cuda.synchronize(index)
        found.append(out.detach().cpu())
        gradients.append([p.grad.cpu() for p in here.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*gradients)
