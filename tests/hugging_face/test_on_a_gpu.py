"""What accelerate does otherwise on a GPU: products add their biases, those of q, k and v are one.
Here on CPU tensors, which are taken for a GPU's; what a GPU alone can show is marked so."""

import contextlib
import copy
import inspect
import weakref

import pytest
import torch
import transformers
from small_models import batch, bert, check, same
from test_accelerate import FAMILIES, build
from torch import nn

import bert_fast
from bert_fast import backends
from bert_fast.hugging_face import accelerated
from bert_fast.models import bert as bert_file
from bert_fast.models import blocks, repeat


class Seen:
    """Counts of what a forward computes with."""

    def __init__(self):
        self.products = self.with_bias = self.attentions = self.in_attention = 0

    def clear(self):
        self.__init__()


@pytest.fixture
def seen(monkeypatch):
    seen = Seen()
    for place in (blocks, accelerated):
        monkeypatch.setattr(place, "product_adds_bias", lambda x: True)
    for place in (blocks, accelerated, bert_file):
        monkeypatch.setattr(place, "can_reuse_memory", lambda x: False)
    linear = torch.nn.functional.linear

    def counted(x, weight, bias=None):
        if x.ndim == 2 and len(x) > 3:  # not a pooler's
            seen.products += 1
            seen.with_bias += bias is not None
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    for name in ("attention", "attention_qkv"):
        function = getattr(bert_fast.ops, name)

        def watched(*args, _function=function, **options):
            seen.attentions += 1
            seen.in_attention += options.get("bias") is not None
            return _function(*args, **options)

        monkeypatch.setattr(bert_fast.ops, name, watched)
    return seen


def prepacked(model):
    """Accelerated, with what prepack asks for on a GPU, and not on the CPU."""
    bert_fast.accelerate(model)
    for module in model.modules():
        if isinstance(module, accelerated._Layer):
            module._bert_fast.prepacked = True
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("made", [bert_fast.accelerate, prepacked])
def test_every_family(seen, family, made):
    theirs = build(family)
    ours = made(copy.deepcopy(theirs))
    inputs = batch()
    with torch.no_grad():
        found = ours(**inputs)[0]
        assert (seen.attentions, seen.in_attention) == (3, 0)
        same(found, theirs(**inputs)[0], inputs["attention_mask"])
    check(theirs, ours, inputs)


def test_each_family_keeps_its_signature():
    """transformers and sentence-transformers read it; also with several accelerated."""
    every = [build(family) for family in FAMILIES]
    wanted = [inspect.signature(model.forward) for model in every]
    for model in every:
        bert_fast.accelerate(model)
    assert [inspect.signature(model.forward) for model in every] == wanted


def test_products_a_layer(seen):
    for made, least in ((bert_fast.accelerate, (6, 3)), (prepacked, (4, 1))):
        ours, inputs = made(bert()), batch()
        for grad, (products, with_bias) in ((False, least), (True, (6, 3))):
            seen.clear()
            with torch.set_grad_enabled(grad):
                ours(**inputs)
            assert seen.products == products * 2
            assert seen.with_bias == with_bias * 2


def by_an_optimizer(model):
    """Fused, it writes without the weights' knowing; between two calls in inference."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def as_a_moving_average(model):
    """A teacher's weights, with no word to anybody."""
    for parameter in model.parameters():
        parameter.data.mul_(0.5).add_(0.01)


@pytest.mark.parametrize(
    ("made", "change"),
    [
        (prepacked, by_an_optimizer), (bert_fast.accelerate, by_an_optimizer),
        (bert_fast.accelerate, as_a_moving_average),
    ],
)  # fmt: skip
def test_what_no_weight_tells_of(seen, made, change):
    theirs = bert()
    ours, inputs = made(copy.deepcopy(theirs)), batch()
    with torch.no_grad():
        before = ours(**inputs)[0]
        for model in (ours, theirs):
            with torch.enable_grad():
                change(model)
        found = ours(**inputs)[0]
        assert (found - before).abs().max() > 1e-3
        same(found, theirs(**inputs)[0], inputs["attention_mask"])


def query(model):
    return model.encoder.layer[0].attention.self.query


def in_place(model):
    with torch.no_grad():
        query(model).weight.mul_(1.5)


def bias_in_place(model):
    with torch.no_grad():
        model.encoder.layer[1].attention.self.value.bias.add_(1.0)


def through_data(model):
    """As a moving average is put in the weights' place, in between."""
    model.train()
    query(model).weight.data.mul_(1.5)
    model.eval()


def other_memory(model):
    query(model).weight.data = query(model).weight.detach() * 1.5


def other_parameter(model):
    query(model).weight = nn.Parameter(query(model).weight.detach() * 1.5)


def other_module(model):
    linear = nn.Linear(32, 32)
    linear.load_state_dict({n: 1.5 * t for n, t in query(model).state_dict().items()})
    model.encoder.layer[0].attention.self.query = linear


def wrapped_and_merged(model):
    """The same module in its place again, with other numbers, written through ``.data``."""
    import peft

    torch.manual_seed(5)
    config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    peft.get_peft_model(model, config).merge_and_unload()


def wrapped(model):
    import peft

    torch.manual_seed(5)
    config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    peft.get_peft_model(model, config)


def loaded(model):
    model.load_state_dict({n: 1.2 * t for n, t in model.state_dict().items()})


def trained(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(**batch())[0][:, 0].square().mean().backward()
    optimizer.step()


def moved(model):
    model.half().float()


def other_norm(model):
    norm = nn.LayerNorm(32)
    nn.init.normal_(norm.weight)
    model.encoder.layer[1].output.LayerNorm = norm


def other_eps(model):
    model.encoder.layer[0].output.LayerNorm.eps = 0.5


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        in_place, bias_in_place, through_data, other_memory, other_parameter, other_module,
        wrapped, wrapped_and_merged, loaded, trained, moved, other_norm, other_eps,
    ],
)  # fmt: skip
def test_a_change_after_accelerate_is_seen_by_the_next_call(seen, change, frozen):
    theirs = bert()
    if frozen:
        if change is trained:
            pytest.skip("what is frozen is not trained")
        theirs.requires_grad_(False)
    ours = prepacked(copy.deepcopy(theirs))
    inputs = batch()
    with torch.no_grad():
        before = ours(**inputs)[0]
    torch.manual_seed(7)
    change(ours)
    with torch.no_grad():
        found = ours(**inputs)[0]
        if change is not trained:
            torch.manual_seed(7)
            change(theirs)
        wanted = (bert_fast.restore(copy.deepcopy(ours)) if change is trained else theirs)(**inputs)
        same(found, wanted[0], inputs["attention_mask"])
        if change is not moved:
            assert (found - before).abs().max() > 1e-3
        same(ours(**inputs)[0], wanted[0], inputs["attention_mask"])


def test_the_copy_goes_with_the_model(seen):
    """And with what of it is replaced; a copy of the model has none, nor has what is saved."""
    ours, inputs = prepacked(bert()), batch()
    with torch.no_grad():
        ours(**inputs)
        kept = [weakref.ref(p) for p in accelerated.kept_of(ours).values()]
        assert len(kept) == 2
        assert not accelerated.kept_of(copy.deepcopy(ours))
        query(ours).weight = nn.Parameter(query(ours).weight.detach() + 1)
        ours(**inputs)
    del ours
    import gc

    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_the_copy_is_made_once(seen):
    """sentence-transformers calls eval() before each batch."""
    ours, inputs = prepacked(bert()), batch()
    with torch.no_grad():
        ours(**inputs)
        before = [parts._fused[1] for parts in accelerated.kept_of(ours).values()]
        ours.eval()
        ours(**inputs)
        after = [parts._fused[1] for parts in accelerated.kept_of(ours).values()]
    assert len(before) == len(after) == 2
    assert all(a is b and a.shape == (96, 32) for a, b in zip(before, after, strict=True))


def lay_together(model):
    for layer in model.encoder.layer:
        own = layer.attention.self
        three = own.query, own.key, own.value
        for name in ("weight", "bias"):
            parts = [getattr(linear, name) for linear in three]
            whole = torch.cat([p.detach() for p in parts])
            for part, rows in zip(parts, whole.split(32), strict=True):
                part.data = rows


def test_what_lies_together_is_read_where_it_lies(seen):
    """One product in training, too, and no copy; the gradients are the parameters'."""
    theirs = bert()
    ours = copy.deepcopy(theirs).double()
    lay_together(ours)
    bert_fast.accelerate(ours)
    inputs = batch()
    check_together(theirs, ours, inputs)
    for grad in (False, True):
        seen.clear()
        with torch.set_grad_enabled(grad):
            ours(**inputs)
        assert (seen.products, seen.with_bias) == (4 * 2, 1 * 2)
    for parts in accelerated.kept_of(ours).values():
        assert parts._fused == (None, None, None)
    with torch.no_grad():  # even a write that PyTorch does not see
        query(ours).weight.data.mul_(1.5)
        query(theirs).weight.data.mul_(1.5)
        same(ours(**inputs)[0], theirs.double()(**inputs)[0], inputs["attention_mask"], 1e-10)


def check_together(theirs, ours, inputs):
    theirs.double()
    mask = inputs["attention_mask"]
    outs = [model(**inputs)[0] for model in (ours, theirs)]
    same(*outs, mask, atol=1e-10)
    weight = torch.randn_like(outs[0]) * mask[..., None]
    for out in outs:
        (out * weight).sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        if q.grad is not None:
            same(p.grad, q.grad, atol=1e-9)


@pytest.mark.parametrize("where", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_under_autocast(seen, where):
    """The copy is in autocast's dtype there, and in the parameters' outside."""
    theirs = bert().requires_grad_(False)
    ours = prepacked(copy.deepcopy(theirs))
    inputs = batch()
    exact = copy.deepcopy(theirs).double()(**inputs)[0]
    mask = inputs["attention_mask"].bool()
    with where():
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found, peer = ours(**inputs)[0], theirs(**inputs)[0]
            error, allowed = ((a.double() - exact)[mask].norm() for a in (found, peer))
            assert error <= 2 * allowed
            same(ours(**inputs)[0], theirs(**inputs)[0], inputs["attention_mask"])


def test_two_threads(seen):
    from concurrent.futures import ThreadPoolExecutor

    theirs = bert()
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    every = [batch((n, 2)) for n in range(2, 12)] * 4

    def run(inputs):
        with torch.no_grad():
            return ours(**inputs)[0]

    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        for inputs, found in zip(every, pool.map(run, every), strict=True):
            same(found, theirs(**inputs)[0], inputs["attention_mask"])


def test_our_model_adds_the_bias_in_the_product(seen, tmp_path):
    theirs = bert(transformers.BertForTokenClassification)
    theirs.save_pretrained(tmp_path)
    ours = bert_fast.BertForTokenClassification.from_pretrained(tmp_path).eval()
    inputs = batch()
    with torch.no_grad():
        found = ours(**inputs).logits
    assert seen.attentions == 2
    assert not seen.in_attention
    same(found, theirs(**inputs).logits, inputs["attention_mask"])


def test_layers_alone_add_the_bias_in_the_product(seen):
    theirs = nn.TransformerEncoderLayer(32, 2, 64, 0.0, "gelu", batch_first=True).double()
    nn.init.normal_(theirs.self_attn.in_proj_bias)
    ours = bert_fast.nn.EncoderLayer(32, 2, 64, 0.0).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    outs = ours(x), theirs(x)
    torch.testing.assert_close(*outs)
    assert (seen.attentions, seen.in_attention) == (1, 0)
    weight = torch.randn_like(x)
    for out in outs:
        (out * weight).sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.fixture
def repeated(monkeypatch):
    """The layers that were repeated, by Triton's kernels interpreted."""
    if reason := backends.why_unavailable("triton"):
        pytest.skip(reason)
    monkeypatch.setitem(backends.AUTO, "cpu", ("triton", "eager"))
    monkeypatch.setattr(repeat, "product_adds_bias", lambda x: True)
    layers, call = [], bert_fast.ops.Repeat.__call__

    def noted(self, *args):
        layers.append(len(layers))
        return call(self, *args)

    monkeypatch.setattr(bert_fast.ops.Repeat, "__call__", noted)
    return layers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("made", [bert_fast.accelerate, prepacked])
@torch.no_grad()
def test_layers_repeat_the_first(seen, repeated, family, made):
    theirs = build(family)
    ours = made(copy.deepcopy(theirs))
    inputs = batch()
    has_position_bias = family == "MPNet"  # whose first layer runs as it stands
    for number in (1, has_position_bias):
        repeated.clear()
        found, expected = ours(**inputs)[0], theirs(**inputs)[0]
        assert len(repeated) == len(list(layers_of(ours))) - number >= 1
    same(found, expected, inputs["attention_mask"], atol=1e-4)


def layers_of(model):
    return (m for m in model.modules() if isinstance(m, accelerated._Layer))


def called(layer):
    """Another module in a linear layer's place is called, and adds its bias itself."""
    linear = next(m for m in layer.modules() if isinstance(m, nn.Linear))
    nn.utils.parametrize.register_parametrization(linear, "weight", Doubled())


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def noisy(layer):
    norm = [m for m in layer.modules() if isinstance(m, nn.LayerNorm)][-1]
    norm.eps = 0.5


def written_unseen(layer):
    """Written where nobody sees it."""
    for parameter in layer.parameters():
        parameter.data = parameter.data.flip(0).contiguous()


@pytest.mark.parametrize(("change", "number"), [(called, 1), (noisy, 1), (written_unseen, 2)])
@torch.no_grad()
def test_a_changed_layer_is_another(seen, repeated, change, number):
    theirs = bert()
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    inputs = batch()
    ours(**inputs)
    for model in (theirs, ours):
        change(model.encoder.layer[1])
    repeated.clear()
    same(ours(**inputs)[0], theirs(**inputs)[0], inputs["attention_mask"], atol=1e-4)
    assert len(repeated) == number
