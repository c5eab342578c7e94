"""What is set by hand on an accelerated model, or patched under it: obeyed, or transformers' code
comes back, with one warning. The right numbers are those of the same change without accelerate."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from small_models import SIZES, batch, bert, said, same
from torch import nn
from transformers.models.bert import modeling_bert

import bert_fast

DISTILBERT = dict(
    vocab_size=60, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=40,
    initializer_range=0.2,
)  # fmt: skip
MODELS = {
    "Bert": (transformers.BertModel, transformers.BertConfig, SIZES),
    "DistilBert": (transformers.DistilBertModel, transformers.DistilBertConfig, DISTILBERT),
    "MPNet": (transformers.MPNetModel, transformers.MPNetConfig, SIZES),
}


def layer(model, number=1):
    return (model.transformer if hasattr(model, "transformer") else model.encoder).layer[number]


def scaling(model):
    layer(model).attention.self.scaling = 0.7


def causal(model):
    layer(model).attention.self.is_causal = True
    model.config._attn_implementation = "sdpa"


def activation(model):
    layer(model).intermediate.intermediate_act_fn.act = torch.relu


def eps(model):
    layer(model).output.LayerNorm.eps = 0.5


def norm_weights(model):
    nn.init.normal_(layer(model).output.LayerNorm.weight)


@pytest.mark.parametrize(
    ("change", "warned"),
    [(scaling, True), (causal, True), (activation, True), (eps, False), (norm_weights, False)],
)
def test_attributes(attention, change, warned):
    theirs = bert()
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    early = copy.deepcopy(theirs)
    ours(**batch())
    seed = torch.initial_seed()
    for model in (theirs, ours, early):
        torch.manual_seed(seed)
        change(model)
    bert_fast.accelerate(early)
    inputs = {"input_ids": torch.randint(1, 60, (2, 9))}
    with torch.no_grad():
        wanted = theirs(**inputs)[0]
        for model in (ours, early):
            told = said(lambda m=model: same(m(**inputs)[0], wanted))
            assert len(told) == (warned and model is ours)  # it is said once
    bert_fast.hugging_face.families.warn_once.cache_clear()


@pytest.mark.parametrize("name", MODELS)
def test_which_modules_training_lets_what_drop(name):
    """Module by module, and all dropouts alone, as Monte-Carlo dropout has it: whether anything
    drops, at a rate that leaves no doubt."""
    kind, config, sizes = MODELS[name]
    theirs = kind(config(**sizes)).eval()
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    ids = torch.randint(4, 60, (2, 9))
    paths = [path for path, module in layer(theirs).named_modules() if path]
    changes = [lambda m, p=path: layer(m).get_submodule(p).train(True) for path in paths]
    changes.append(lambda m: [d.train() for d in m.modules() if isinstance(d, nn.Dropout)])
    dropped = []
    for change in changes:
        changed = copy.deepcopy(theirs)
        change(changed)
        ours = bert_fast.accelerate(copy.deepcopy(changed))
        with torch.no_grad():
            wanted, *found = (m(ids)[0] for m in (theirs, changed, ours))
        changed, ours = ((out - wanted).abs().max() > 1e-3 for out in found)
        assert changed == ours
        dropped.append(bool(ours))
    assert any(dropped)
    assert not all(dropped)


def test_patched_forwards(attention, monkeypatch):
    theirs = bert()
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    inputs = batch()
    ours(**inputs)
    for kind in (
        modeling_bert.BertSelfAttention, modeling_bert.BertSelfOutput, modeling_bert.BertLayer,
        modeling_bert.BertEncoder, nn.LayerNorm,
    ):  # fmt: skip
        bert_fast.hugging_face.families.warn_once.cache_clear()
        with monkeypatch.context() as patch:
            real = kind.forward

            def doubled(self, *args, _real=real, **kwargs):
                out = _real(self, *args, **kwargs)
                if isinstance(out, transformers.utils.ModelOutput):
                    out["last_hidden_state"] = 2 * out["last_hidden_state"]
                    return out
                return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

            patch.setattr(kind, "forward", doubled)
            late = bert_fast.accelerate(copy.deepcopy(theirs))
            with torch.no_grad():
                wanted = theirs(**inputs)[0]
                for model in (ours, late):
                    found = []
                    told = said(lambda m=model, f=found: f.append(m(**inputs)[0]))
                    same(found[0], wanted, inputs["attention_mask"])
                    assert len(told) == (model is ours)
        count = len(attention)
        ours(**inputs)
        assert len(attention) > count  # and back


def test_attentions_of_somebodys_own(attention, monkeypatch):
    def own(module, query, key, value, attention_mask, **kwargs):
        out = F.scaled_dot_product_attention(query, 2 * key, value)
        return out.transpose(1, 2), None

    ids = torch.randint(1, 60, (2, 9))
    names = transformers.AttentionInterface()
    for name in ("sdpa_own", "sdpa"):
        bert_fast.hugging_face.families.warn_once.cache_clear()
        theirs = bert()
        ours = bert_fast.accelerate(copy.deepcopy(theirs))
        monkeypatch.setitem(names._global_mapping, name, own)
        for model in (theirs, ours):
            model.config._attn_implementation = name
        with torch.no_grad():
            assert len(said(lambda o=ours, t=theirs: same(o(ids)[0], t(ids)[0]))) == 1
    assert not attention


@pytest.mark.parametrize("prepack", [False, True])
def test_functional_call(attention, prepack):
    theirs = bert()
    ours = bert_fast.accelerate(copy.deepcopy(theirs), prepack=prepack)
    inputs = batch()
    with torch.no_grad():
        before = ours(**inputs)[0]
        weights = {name: p + 0.1 * torch.randn_like(p) for name, p in theirs.named_parameters()}
        wanted = torch.func.functional_call(theirs, weights, (), inputs)[0]
        found = torch.func.functional_call(ours, weights, (), inputs)[0]
        same(found, wanted, inputs["attention_mask"])
        assert torch.equal(ours(**inputs)[0], before)
    assert attention


def test_transforms_of_torch_func(attention):
    """Gradients of each example, by vmap over grad."""
    theirs = bert(attn_implementation="eager")
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    ids = torch.randint(1, 60, (3, 7))
    weights = dict(theirs.named_parameters())

    def gradients(model):
        def loss(values, row):
            return torch.func.functional_call(model, values, (row[None],))[0].square().mean()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, ids)

    wanted = gradients(theirs)
    found = {}
    assert len(said(lambda: found.update(gradients(ours)))) == 1
    for name in wanted:
        same(found[name], wanted[name])
    assert not attention
