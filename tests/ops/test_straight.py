"""Where nobody looks on, an op runs its kernels without torch.library between; who looks on sees
every op as before, and the numbers are the same."""

import contextlib

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import bert_fast
from bert_fast import backends

CU = torch.tensor([0, 5, 5, 14], dtype=torch.int32)
SEED = torch.tensor([7])


def calls():
    """name -> the op's function, and its arguments, floating ones first."""
    x, y, vector = torch.randn(6, 20), torch.randn(6, 20), torch.randn(20)
    qkv, bias = torch.randn(14, 3, 2, 8), torch.randn(3, 2, 8)

    def attention(q, k, v, bias):
        return bert_fast.attention(q, k, v, CU, bias=bias, dropout_p=0.2, seed=SEED)

    def attention_qkv(qkv, bias):
        return bert_fast.attention_qkv(qkv, CU, max_seqlen=9, bias=bias)

    def layer_norm(x, weight, bias, residual, linear_bias):
        return bert_fast.layer_norm(
            x, weight, bias, residual=residual, linear_bias=linear_bias, dropout_p=0.1, seed=SEED
        )

    def embedding_layer_norm(word, position, token_type, weight, bias):
        ids = torch.arange(6)
        return bert_fast.ops.embedding_layer_norm(
            ids, ids, None, word, position, token_type, weight, bias
        )

    return {
        "attention": (attention, [*qkv.unbind(1), bias]),
        "attention_qkv": (attention_qkv, [qkv, bias]),
        "layer_norm": (layer_norm, [x, vector, vector + 1, y, vector - 1]),
        "layer_norm, plain": (bert_fast.layer_norm, [x, vector, vector + 1]),
        "gelu": (bert_fast.gelu, [x, vector]),
        "gelu, plain": (bert_fast.gelu, [x]),
        "linear_gelu": (bert_fast.ops.linear_gelu, [x, torch.randn(9, 20), vector[:9]]),
        "embedding_layer_norm": (embedding_layer_norm, [x, y, y[:2], vector, vector]),
    }


class Listed(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "bert_fast":
            self.ops.append((function._opname, args))
        return function(*args, **(kwargs or {}))


def through_library(function, *args):
    """The names of the ops of ours that torch saw."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function(*args)
    seen = [e.name.partition("::")[2] for e in profile.events() if e.name[:11] == "bert_fast::"]
    return seen, result


def with_gradients(function, args):
    args = [a.detach().clone().requires_grad_() for a in args]
    out = function(*args)
    return [out, *torch.autograd.grad(out, args, torch.ones_like(out).cumsum(0))]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", calls())
def test_straight_is_the_same(name, backend):
    if reason := backends.why_unavailable(backend):
        pytest.skip(reason)
    function, args = calls()[name]
    with bert_fast.use_backend(backend):
        seen, straight = through_library(with_gradients, function, args)
        assert seen == []
        with torch.no_grad():
            seen, inference = through_library(function, *args)
        assert seen == []
        with Listed() as listed:
            wanted = with_gradients(function, args)
    assert {op for op, _ in listed.ops if not op.endswith("backward")}
    assert [op for op, _ in listed.ops if op.endswith("backward")]
    assert torch.equal(inference, straight[0])
    for ours, theirs in zip(straight, wanted, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype


class Subclass(torch.Tensor):
    pass


def traced(function, *args):
    graph = torch.jit.trace(lambda *args: function(*args), args, check_trace=False).graph
    return [node.kind() for node in graph.nodes() if "bert_fast" in node.kind()]


def symbolic(function, *args):
    graph = make_fx(lambda x: function(x))(*args).graph
    return [str(node.target) for node in graph.nodes if "bert_fast" in str(node.target)]


def listed(function, *args):
    with Listed() as listed:
        function(*args)
    return listed.ops


def of_a_subclass(function, *args):
    return through_library(function, *(a.as_subclass(Subclass) for a in args))[0]


@pytest.mark.parametrize("look", [traced, symbolic, listed, of_a_subclass])
@pytest.mark.parametrize("gradients", [False, True])
def test_who_looks_on_sees_the_op(look, gradients):
    x = torch.randn(4, 6, requires_grad=gradients)
    assert look(bert_fast.gelu, x)
    assert look(lambda x: bert_fast.layer_norm(x, x[0], x[1]), x)


def test_transforms_are_refused_not_forgotten():
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: bert_fast.gelu(x).sum())(torch.randn(4, 6))


def test_forward_mode_is_refused_not_forgotten():
    x = torch.randn(4, 6, requires_grad=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises((RuntimeError, NotImplementedError)):
            bert_fast.gelu(dual)


@pytest.mark.parametrize("look", [contextlib.nullcontext, Listed])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_inference_asks_layer_norm_for_its_output_alone(mode, look, monkeypatch):
    """Where no gradient is wanted: neither the sum nor mean and rstd are made."""
    found, module = [], backends.module("cpu")
    real = module.layer_norm_forward

    def forward(*args, **options):
        found.append(real(*args, **options))
        return found[-1]

    monkeypatch.setattr(module, "layer_norm_forward", forward)
    x, weight = torch.randn(6, 20), torch.randn(20)
    with mode(), look():
        bert_fast.layer_norm(x, weight, weight, residual=x, backend="cpu")
    assert found[0][1:] == (None, None, None)
    bert_fast.layer_norm(x, weight.requires_grad_(), weight, residual=x, backend="cpu")
    assert not any(t is None for t in found[1])


def test_traced_for_inference_layer_norm_refuses_to_train():
    x, weight = torch.randn(6, 20), torch.randn(20, requires_grad=True)
    with pytest.raises(RuntimeError, match="layer_norm was traced for inference"):
        torch.ops.bert_fast.layer_norm(x, None, weight, weight, None, 1e-5, 0.0, None, "cpu", False)


def test_no_zeros_are_made_for_outputs_without_gradient(monkeypatch):
    """A kernel each, on a GPU, that nobody reads."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    x, weight = torch.randn(6, 20), torch.randn(20, requires_grad=True)
    out = bert_fast.layer_norm(x, weight, weight, residual=x, backend="cpu")
    dout = torch.ones_like(out)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(out, weight, dout)
    names = {event.name for event in profile.events()}
    assert not names & {"aten::zeros", "aten::zeros_like", "aten::fill_", "aten::zero_"}, names


class Forgets(torch.autograd.Function):
    """Gives its argument no gradient, in the place of zeros."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dout):
        return None


@pytest.mark.parametrize("name", calls())
def test_no_gradient_behind_is_none_in_front(name):
    function, inputs = calls()[name]
    leaves = [t.clone().requires_grad_() for t in inputs]
    (Forgets.apply(function(*leaves)).sum() + sum(t.sum() for t in leaves)).backward()
    assert all(torch.equal(t.grad, torch.ones_like(t)) for t in leaves)


@pytest.mark.parametrize("first_alone", [True, False])
@pytest.mark.parametrize("name", calls())
def test_a_second_derivative_is_refused_not_forgotten(name, first_alone):
    """As of a gradient's penalty: also where all but one input are frozen, so that nothing that was
    kept for backward needs a gradient."""
    function, inputs = calls()[name]
    leaves = [t.clone().requires_grad_(i == 0 or not first_alone) for i, t in enumerate(inputs)]
    (gradient,) = torch.autograd.grad(function(*leaves).sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("numbers", [(0.5, 1, 2), (0, 1.5, 2)])
def test_whole_numbers_are_numbers(numbers):
    """As of a kernel that was launched with another type before."""
    x, weight = torch.randn(3, 16), torch.randn(16)
    for eps in numbers:
        for backend in ("triton", "cpu"):
            found = bert_fast.layer_norm(x, weight, weight, eps=eps, backend=backend)
            wanted = torch.nn.functional.layer_norm(x, (16,), weight, weight, float(eps))
            torch.testing.assert_close(found, wanted)
