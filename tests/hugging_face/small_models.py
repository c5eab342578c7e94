"""Small drawn models of transformers, and how two that should be alike are compared."""

import warnings

import torch
import transformers
from torch import nn

SIZES = dict(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=40, initializer_range=0.2,
)  # fmt: skip


def bert(kind=transformers.BertModel, **config):
    return kind(transformers.BertConfig(**SIZES, **config)).eval()


def batch(lengths=(11, 4, 7)):
    ids = torch.randint(1, 60, (len(lengths), max(lengths)))
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def same(found, wanted, mask=None, atol=2e-5):
    if mask is not None:
        found, wanted = found * mask[..., None], wanted * mask[..., None]
    scale = wanted.abs().max().clamp(min=1.0).item()
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol * scale)


def check(theirs, ours, inputs=None):
    """Outputs, and gradients of every parameter that learns, in float64: what is computed is tested
    here, not how exactly."""
    inputs = inputs or batch()
    theirs.double(), ours.double()
    found, wanted = ours(**inputs)[0], theirs(**inputs)[0]
    mask = inputs["attention_mask"] if found.ndim == 3 else None
    same(found, wanted, mask, atol=1e-10)
    weight = torch.randn_like(wanted) * (1 if mask is None else mask[..., None])
    for model, out in ((ours, found), (theirs, wanted)):
        model.zero_grad()
        (out * weight).sum().backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad and grads[name] is not None:
            same(parameter.grad, grads[name], atol=1e-9)
    theirs.float(), ours.float()


def said(call):
    """The warnings of ours that a call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "bert_fast leaves" in str(w.message)]


def other_norm(model):
    model.encoder.layer[0].output.LayerNorm = nn.Identity()
