"""for_inference("float8"): whole models, whose products are computed by their definition on a CPU;
on a GPU that has them, by torch."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TRITON, assert_within
from torch._subclasses.fake_tensor import FakeTensorMode

import bert_fast
from bert_fast.models import float8
from bert_fast.models.blocks import Linear
from bert_fast.models.graphs import CudaGraphs

SIZES = dict(
    vocab_size=60, hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=80, max_position_embeddings=20, initializer_range=0.2,
)  # fmt: skip


@pytest.fixture
def emulated(monkeypatch, device):
    if device == "cuda" and torch.cuda.get_device_capability() < float8.SINCE:
        pytest.skip("needs compute capability 8.9")
    monkeypatch.setattr(float8, "emulated", device == "cpu")


@pytest.fixture
def model(emulated, device):
    return drawn().to(device)


@pytest.fixture
def inputs(device):
    ids, mask = (
        torch.randint(1, 60, (4, 11)),
        torch.arange(11) < torch.tensor([11, 4, 0, 7])[:, None],
    )
    return ids.to(device), mask.long().to(device)


def drawn(kind=bert_fast.BertModel, dtype=torch.bfloat16, **sizes):
    return kind(bert_fast.BertConfig(**{**SIZES, **sizes})).eval().to(dtype)


def last(model, inputs):
    return model(*inputs).last_hidden_state


def rounded(x):
    """``x`` with each row on e4m3's grid times the row's scale: four bits of a number, or of 2^-6
    of the grid."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    step = 2.0 ** (torch.log2((x / scale).abs().clamp(min=2.0**-6)).floor() - 3)
    return (x / scale / step).round() * step * scale


class Naive(Linear):
    """A product in float64 of what is rounded to float8 alone."""

    def matmul(self, x, out, workspace):
        return F.linear(rounded(x), rounded(self.weight))

    def project(self, x, out, workspace):
        return self.matmul(x, None, None), self.bias

    def gelu(self, x, approximate, out, workspace):
        return F.gelu(self.matmul(x, None, None) + self.bias, approximate=approximate)


def exact_and_naive(model, inputs):
    """The same weights' hidden states in float64, and with products of float8 numbers."""
    exact, found = copy.deepcopy(model).cpu().double(), []
    inputs = [t.cpu() for t in inputs]
    with torch.no_grad(), bert_fast.use_backend("eager"):
        found.append(last(exact, inputs))
        for module in exact.layers.modules():
            if isinstance(module, Linear):
                module.__class__ = Naive
        found.append(last(exact, inputs))
    return found


@pytest.mark.parametrize("backend", ["auto", "eager", TRITON[0] if TRITON else "auto"])
@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_errs_as_float8_does(emulated, device, inputs, backend, act):
    """No more than products that are exact but for that rounding, twice at most (as ops are held
    to PyTorch): bfloat16 between them adds little."""
    model = drawn(hidden_act=act)
    exact, naive = exact_and_naive(model, inputs)
    assert model.to(device).for_inference("float8") is not None
    with bert_fast.use_backend(backend if device == "cpu" else "auto"):
        found = last(model, inputs)
    assert (found.dtype, found.requires_grad) == (torch.bfloat16, False)
    assert_within(found.cpu(), naive.bfloat16(), exact)
    assert not torch.equal(found.cpu(), exact.bfloat16())


@pytest.mark.skipif(not TRITON, reason="the package triton is not installed")
def test_rows_come_from_the_epilogues(model, inputs, device):
    """Of their own kernel only the embeddings' and attention's."""
    from bert_fast.kernels import float8 as kernels
    from bert_fast.kernels.launch import recorded

    model.for_inference("float8")
    kinds = []
    with bert_fast.use_backend("triton"):
        for _ in range(2):  # a launch that is new is listed as None
            with recorded() as launches:
                last(model, inputs)
            ours = [launch for launch in launches if launch and "KIND" in launch.constants]
            kinds = [launch.constants["KIND"] for launch in ours]
    plain, gelu, norm = (kind.value for kind in (kernels.PLAIN, kernels.GELU, kernels.NORM))
    assert kinds == [plain] + [plain, norm, gelu, norm] * SIZES["num_hidden_layers"]


def assert_same(found, wanted):
    """Of a GPU's products of other numbers of rows the sums may be rounded otherwise."""
    if found.is_cuda:
        assert (found - wanted).float().norm() < 0.1 * wanted.float().norm()
    else:
        assert torch.equal(found, wanted)


def test_what_it_can_be_used_with(model, inputs, device):
    wanted = last(model.for_inference("float8"), inputs)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(device)):
        assert_same(last(same, inputs), wanted)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast(device, torch.float16)):
        with mode:
            assert_same(last(model, inputs).bfloat16(), wanted)
    states = model(*inputs, output_hidden_states=True).hidden_states
    assert len(states) == SIZES["num_hidden_layers"] + 1
    assert_same(states[-1], wanted)
    assert_same(model(*inputs, capacity=30).last_hidden_state, wanted)  # rows past the last token
    assert last(model, (inputs[0], torch.zeros_like(inputs[1]))).count_nonzero() == 0
    assert "layers.1.feed_forward.up.weight_scale" in model.state_dict()


def test_hooks_see_the_layers(model, inputs):
    """A result that one puts in the place of a layer's is what the next one is given."""
    wanted, seen = last(model.for_inference("float8"), inputs), []

    def hook(module, args, out):
        seen.append(type(out))
        return out.value

    for module in (model.layers[0], model.layers[1].attention):
        module.register_forward_hook(hook)
    assert_same(last(model, inputs), wanted)
    assert seen == [bert_fast.ops.Rounded] * 2
    x = torch.randn(2, 3, 48).to(wanted)
    product = model.layers[0].attention.qkv(x)  # called by itself
    assert product.shape == (2, 3, 144)


def test_replayed_by_graphs(model, inputs, device):
    model.for_inference("float8")

    def again(function):  # in the place of a capture
        outputs = function()
        return lambda: [a.copy_(b) for a, b in zip(outputs, function(), strict=True)], outputs

    runner = CudaGraphs(model, capture=again if device == "cpu" else None)
    for _ in range(2):
        found, real = runner(*inputs).last_hidden_state, inputs[1].bool()
        assert_same(found[real], last(model, inputs)[real])
    assert runner.captured == 1


@pytest.mark.parametrize(
    "kind", [bert_fast.BertForSequenceClassification, bert_fast.BertForMaskedLM]
)
def test_heads_stay_as_they_are(emulated, device, inputs, kind):
    model = drawn(kind).to(device)
    found = model.for_inference(torch.float8_e4m3fn)(*inputs).logits
    assert (found.dtype, model.bert.served_in) == (torch.bfloat16, "float8")
    assert found.isfinite().all()
    assert all(p.is_meta == (p.ndim == 2) for p in model.bert.layers.parameters())
    assert not any(p.is_meta for n, p in model.named_parameters() if "layers" not in n)


def test_what_is_not_finite_stays_in_its_text(model, inputs):
    ids = inputs[0]
    ids[ids == 7] = 8
    wanted = last(model.for_inference("float8"), inputs)
    ids[1, 2] = 7
    model.embeddings.word.weight[7, 5] = torch.nan
    found = last(model, inputs)
    assert found[1, :4].isnan().all()
    assert_same(found[[0, 2, 3]], wanted[[0, 2, 3]])


def refused(message, call, error=ValueError):
    with pytest.raises(error, match=message):
        call()


def served(**options):
    return drawn(**options).for_inference("float8")


def test_models_that_do_not_fit_are_refused(monkeypatch, tmp_path):
    refused("compute capability 8.9 or later, not for cpu", served)
    monkeypatch.setattr(float8, "emulated", True)
    refused("models in bfloat16, not in torch.float32", lambda: served(dtype=torch.float32))
    refused("multiples of 16: hidden_size is 72", lambda: served(hidden_size=72))
    refused("multiples of 16: intermediate_size is 72", lambda: served(intermediate_size=72))
    refused("calibration is for int8, not for float8", lambda: drawn().for_inference("float8", []))
    model = drawn()
    with torch.no_grad():
        model.layers[1].feed_forward.up.weight[3, 4] = torch.inf
    refused("up.weight is not finite: in float8", lambda: model.for_inference("float8"))
    refused("one of float32, bfloat16, int8, not 'float8'",
            lambda: bert_fast.accelerate(torch.nn.Linear(2, 2), dtype="float8"))  # fmt: skip
    (tmp_path / "config.json").write_text("{}")
    for dtype in ("float8", torch.float8_e4m3fn):
        refused("'float8' is experimental: BertModel.for_inference",
                lambda dtype=dtype: bert_fast.SentenceEncoder(tmp_path, dtype=dtype))  # fmt: skip


def test_which_gpus_have_it(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    with FakeTensorMode():
        weight = torch.empty(2, 2, dtype=torch.bfloat16, device="cuda")
    model = SimpleNamespace(
        embeddings=SimpleNamespace(word=SimpleNamespace(weight=weight)),
        parameters=lambda: [weight], config=bert_fast.BertConfig(**SIZES),
    )  # fmt: skip
    for capability in ((8, 6), (8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        if capability < (8, 9):
            refused("or later, not for NVIDIA A10", lambda: float8.check(model))
        else:
            float8.check(model)


def test_a_torch_without_the_product_is_refused(monkeypatch):
    """By what it says itself, and the model is as it was."""

    def fails(*args):
        raise RuntimeError("Rowwise scaling is not currently supported on your device")

    monkeypatch.setattr(float8, "emulated", True)
    model, ids = drawn(), torch.randint(1, 60, (2, 5))
    wanted = last(model, [ids])
    monkeypatch.setattr(bert_fast.ops.Float8Weight, "product", fails)
    refused("cannot multiply by row on cpu: Rowwise", lambda: model.for_inference("float8"))
    assert model.served_in is None
    assert torch.equal(last(model, [ids]), wanted)


def test_what_such_a_model_cannot_do_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(float8, "emulated", True)
    model, ids = served(), torch.randint(1, 60, (2, 5))
    for change in (model.float, model.half, lambda: model.to("meta")):
        refused("has packed this model for the CPU", change, RuntimeError)
    refused("weights: load it anew", lambda: model.load_state_dict({}), RuntimeError)
    refused("model in float8 is not saved", lambda: model.save_pretrained(tmp_path))
    refused("packed in float8", lambda: model.for_inference("float8"))
    refused("is for inference: call eval", lambda: model.train()(ids), RuntimeError)
    assert list(tmp_path.iterdir()) == []
    wanted = last(model.eval(), [ids])
    model.layers[0].feed_forward.train()  # a part by itself drops as it does elsewhere
    assert not torch.equal(last(model, [ids]), wanted)
