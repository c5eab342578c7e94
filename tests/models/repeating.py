"""For tests of layers that repeat others' launches."""

import pytest
import torch
from torch import nn

import bert_fast
from bert_fast import backends, ops
from bert_fast.models import bert, blocks, repeat

NO_TRITON = backends.why_unavailable("triton")


@pytest.fixture(name="on")
def on_device(device, monkeypatch):
    """The device; the CPU then takes its turns as a GPU does, with Triton's kernels interpreted."""
    if device == "cpu":
        for module in (blocks, repeat):
            monkeypatch.setattr(module, "product_adds_bias", lambda x: True)
        monkeypatch.setattr(bert, "can_reuse_memory", lambda x: False)
        monkeypatch.setitem(backends.AUTO, "cpu", ("triton", "eager"))
    return device


@pytest.fixture(name="repeated")
def repeated_layers(monkeypatch):
    """The layers that were repeated, a number for each call of one."""
    seen, call = [], ops.Repeat.__call__

    def noted(self, *args):
        seen.append(len(seen))
        return call(self, *args)

    monkeypatch.setattr(ops.Repeat, "__call__", noted)
    return seen


def drawn(device, layers=3, dtype=torch.float32, **settings):
    sizes = {
        "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2,
        "intermediate_size": 48, "vocab_size": 40, "max_position_embeddings": 16,
    }  # fmt: skip
    config = bert_fast.BertConfig(**sizes | settings)
    model = bert_fast.BertModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(device, dtype).eval()


def batch(device):
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    return torch.randint(40, mask.shape).to(device), mask.to(device)


def warm(model, inputs):
    """What a launch compiles is not recorded, what the next records is kept."""
    for _ in range(2):
        model(*inputs)


def one_by_one(model, inputs, monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr(repeat.ops, "can_repeat", lambda x: False)
        return model(*inputs, **options)


def check_repeated(model, inputs, repeated, monkeypatch, number=3, **options):
    """So many layers repeat others' launches, and give the bits that they give by themselves."""
    repeated.clear()
    found = model(*inputs, **options)[0]
    assert len(repeated) == number
    assert torch.equal(found, one_by_one(model, inputs, monkeypatch, **options)[0])
