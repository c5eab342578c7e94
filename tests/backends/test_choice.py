"""Choosing a backend: the table, the three overrides, and why one is not available."""

import pytest
import torch

import bert_fast
from bert_fast import backends
from bert_fast.backends import choice


def chosen(dtype=torch.float32, device="cpu", op="gelu", needs_grad=False, backend=None):
    return backends.choose(op, device, dtype, needs_grad, backend)


def test_auto_table():
    assert chosen() == "cpu"
    assert chosen(dtype=torch.float64) == "eager"
    assert chosen(device="meta") == "eager"


def test_argument_beats_context_beats_environment(monkeypatch):
    monkeypatch.setenv("BERT_FAST_BACKEND", "eager")
    assert chosen() == "eager"
    with bert_fast.use_backend("cpu"):
        assert chosen() == "cpu"
        assert chosen(backend="eager") == "eager"
        with bert_fast.use_backend("auto"):
            assert chosen(dtype=torch.float64) == "eager"
    assert chosen() == "eager"


def test_wrong_names(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of"):
        chosen(backend="gpu")
    with pytest.raises(ValueError, match="use_backend must be"), bert_fast.use_backend("gpu"):
        pass
    monkeypatch.setenv("BERT_FAST_BACKEND", "gpu")
    with pytest.raises(ValueError, match="variable BERT_FAST_BACKEND must be"):
        chosen()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_unavailable_says_why(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("BERT_FAST_CUDA_HOST", raising=False)
    monkeypatch.setattr(choice, "_modules", {})
    reason = backends.why_unavailable(name)
    with pytest.raises(bert_fast.BackendUnavailableError, match=name) as error:
        bert_fast.gelu(torch.zeros(2, 2), backend=name)
    assert reason in str(error.value)


def test_cpu_says_what_it_takes():
    with pytest.raises(bert_fast.BackendUnavailableError, match="takes float32, bfloat16, float16"):
        bert_fast.gelu(torch.zeros(2, 2, dtype=torch.float64), backend="cpu")
    with pytest.raises(bert_fast.BackendUnavailableError, match="runs on cpu tensors"):
        chosen(device="cuda", backend="cpu")


def test_a_kernel_without_backward_is_not_chosen_for_training(monkeypatch):
    monkeypatch.delenv("BERT_FAST_CUDA_HOST", raising=False)
    monkeypatch.setitem(choice._modules, "cuda", object())
    forward_only = {"gelu": backends.Support("cuda", backward=False)}
    monkeypatch.setitem(backends.SUPPORT, "cuda", forward_only)
    assert chosen(device="cuda") == "cuda"
    assert chosen(device="cuda", needs_grad=True) == "eager"
    with pytest.raises(bert_fast.BackendUnavailableError, match="no backward yet"):
        chosen(device="cuda", needs_grad=True, backend="cuda")
    with pytest.raises(bert_fast.BackendUnavailableError, match="has no attention kernel"):
        chosen(device="cuda", op="attention", backend="cuda")


def test_auto_prefers_what_has_tensor_cores(monkeypatch):
    monkeypatch.setattr(choice, "why_not", lambda *args: None)
    for capability, wanted in (((9, 0), "triton"), ((7, 5), "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert chosen(device="cuda", op="attention") == wanted
    assert chosen(device="cpu") == "cpu"


def test_auto_asks_the_tensors_own_gpu(monkeypatch):
    """Of two in one machine, neither need be the current one."""
    of = {torch.device("cuda", 0): (7, 5), torch.device("cuda", 1): (9, 0), None: (7, 5)}
    monkeypatch.setattr(choice, "why_not", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: of[device])
    for index, wanted in ((0, "cuda"), (1, "triton")):
        device = torch.device("cuda", index)
        assert chosen(device=device, op="attention") == chosen(device=f"cuda:{index}") == wanted
    assert chosen(device="cuda") == "cuda"
