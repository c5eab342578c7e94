"""for_inference, accelerate(dtype=) and packed checkpoints: products in fp32, bf16 and int8."""

import copy
import json
import pickle
import weakref

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bert_fast
from bert_fast import _C
from bert_fast.files import CheckpointError
from bert_fast.models import inference
from bert_fast.models.packed_file import FORMAT, PACKED_FILE

# How far from fp32, relative, drawn models of two layers may come: measured 2e-3 and 1e-2.
ALLOWED = {"float32": 1e-6, "bfloat16": 2e-2, "int8": 4e-2}
PRECISIONS = list(ALLOWED)
SIZES = dict(
    vocab_size=60, hidden_size=36, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=70, max_position_embeddings=40, initializer_range=0.2,
)  # fmt: skip


def drawn(kind=bert_fast.BertModel, **sizes):
    torch.manual_seed(torch.initial_seed())
    return kind(bert_fast.BertConfig(**{**SIZES, **sizes})).eval()


def batch(lengths=(11, 4, 7, 0)):
    ids = torch.randint(1, 60, (len(lengths), 11))
    return ids, (torch.arange(11) < torch.tensor(lengths)[:, None]).long()


def last(model, *inputs):
    return model(*inputs).last_hidden_state


def distance(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture(params=PRECISIONS)
def precision(request):
    return request.param


def test_nothing_of_the_weights_is_read_or_kept(precision, monkeypatch):
    """They are gone, however large, and also where the model has run before; it is bound once."""
    from bert_fast.backends.cpu import Encoder

    sizes = dict(hidden_size=384, intermediate_size=768, initializer_range=0.05)
    model, inputs, bound, bind = drawn(**sizes), batch(), [], []
    with torch.no_grad():
        wanted = last(model, *inputs)
    weights = [weakref.ref(w) for n, w in model.layers.named_parameters() if n.endswith("weight")]
    weights = [w for w in weights if w().ndim == 2]
    model.for_inference(precision)
    packed = [m.packed for m in model.layers.modules() if getattr(m, "packed", None)]
    released = [of for of in packed if of.released]
    assert all(of.state[2] is None for of in released)
    assert sum(w() is None for w in weights) == len(released)
    call = Encoder._bind
    monkeypatch.setattr(Encoder, "_bind", lambda self: bound.append(1) or call(self))
    bind += [last(model, *inputs) for _ in range(3)]
    assert len(bound) <= 1
    assert torch.equal(bind[0], bind[2])
    assert distance(bind[0], wanted) < ALLOWED[precision]


def test_traced_by_torchscript():
    """A trace writes nothing over what it has read."""
    model, inputs = drawn().requires_grad_(False), batch((11, 4, 7))
    with torch.no_grad():
        traced = torch.jit.trace(lambda *given: last(model, *given), inputs, check_trace=False)
        torch.testing.assert_close(traced(*inputs), last(model, *inputs), rtol=1e-5, atol=1e-5)


def test_near_float32_and_without_the_weights(precision):
    """In any mode of torch's, for the model needs none; the memory of the weights is gone."""
    model, inputs = drawn(), batch()
    with torch.no_grad():
        wanted = last(model, *inputs)
    assert model.for_inference(precision) is model
    found = last(model, *inputs)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert distance(found, wanted) < ALLOWED[precision]
    assert (precision == "float32") == (distance(found, wanted) < ALLOWED["float32"])
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            assert torch.equal(last(model, *inputs), found)
    assert all(p.is_meta for p in model.layers.parameters() if p.ndim == 2)


def test_in_one_call_or_layer_by_layer(precision):
    model, inputs = drawn().for_inference(precision), batch()
    states = model(*inputs, output_hidden_states=True).hidden_states
    assert torch.equal(states[-1], last(model, *inputs))


@pytest.mark.parametrize("others", [0, 5])
def test_a_text_depends_on_no_other(precision, others):
    if _C.linear_kind(0) == "amx" and precision == "float32":
        pytest.skip("with AMX float32 sums depend on the number of rows")
    model = drawn().for_inference(precision)
    ids, mask = batch((9, *[11] * others))
    assert torch.equal(last(model, ids, mask)[0, :9], last(model, ids[:1, :9])[0])


@pytest.mark.parametrize(
    "kind",
    [
        bert_fast.BertModel, bert_fast.BertForSequenceClassification,
        bert_fast.BertForTokenClassification, bert_fast.BertForMaskedLM,
    ],
)  # fmt: skip
def test_packed_checkpoints(precision, kind, tmp_path):
    model, inputs = drawn(kind).for_inference(precision), batch()
    output = "last_hidden_state" if kind is bert_fast.BertModel else "logits"
    wanted = getattr(model(*inputs), output)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [PACKED_FILE, "config.json"]
    again = kind.from_pretrained(tmp_path)
    assert torch.equal(getattr(again(*inputs), output), wanted)
    for same in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(getattr(same(*inputs), output), wanted)
    other = (
        bert_fast.BertForMaskedLM if kind is not bert_fast.BertForMaskedLM else bert_fast.BertModel
    )
    with pytest.raises(CheckpointError, match=f"holds a {kind.__name__}, not a {other.__name__}"):
        other.from_pretrained(tmp_path)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_packed_file_without_its_pooler(precision, tmp_path):
    model, inputs = drawn().for_inference(precision), batch()
    model.save_pretrained(tmp_path)
    ours = bert_fast.BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    found = ours(*inputs)
    assert found.pooler_output is None
    assert torch.equal(found.last_hidden_state, model(*inputs).last_hidden_state)


def test_a_packed_file_is_small(tmp_path):
    model = drawn(hidden_size=96, intermediate_size=400, vocab_size=5)
    whole = sum(p.numel() * 4 for p in model.layers.parameters() if p.ndim == 2)
    rest = sum(p.numel() * 4 for p in model.parameters()) - whole
    model.for_inference("int8").save_pretrained(tmp_path)
    assert (tmp_path / PACKED_FILE).stat().st_size - rest < whole * 0.35


def test_packed_files_that_do_not_fit_are_refused(tmp_path):
    drawn().for_inference("int8").save_pretrained(tmp_path)
    path, load = tmp_path / PACKED_FILE, bert_fast.BertModel.from_pretrained
    about = {"format": FORMAT, "version": "1", "model": "BertModel", "dtype": "int8"}
    state = load_file(path)

    def write(state, **changes):
        save_file(state, path, metadata={**about, **changes})

    write(state, version="2")
    with pytest.raises(CheckpointError, match="version 2; this bert_fast reads 1"):
        load(tmp_path)
    write(state, format="another")
    with pytest.raises(CheckpointError, match="no packed weights of bert_fast"):
        load(tmp_path)
    write({name: value for name, value in state.items() if "norm" not in name})
    with pytest.raises(CheckpointError, match=r"does not fit config.json"):
        load(tmp_path)
    write(
        {
            name: value
            for name, value in state.items()
            if name != "layers.1.attention.qkv.weight_packed"
        }
    )
    with pytest.raises(CheckpointError, match=r"layers.1.attention.qkv.weight_packed is None"):
        load(tmp_path)
    write(state)
    with pytest.raises(
        CheckpointError, match=r"packed in int8: it cannot be had in torch.bfloat16"
    ):
        load(tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 71}))
    with pytest.raises(CheckpointError, match=r"is \(70, 36\), not \(71, 36\)"):
        load(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"truncated or corrupt"):
        load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("layers.0.attention.out.weight_scale"),
        lambda s: s.update({"layers.0.attention.out.weight_scale": torch.ones(3)}),
        lambda s: s.update({"layers.0.attention.out.weight_scale": torch.ones(36).double()}),
        lambda s: s.update({"layers.0.attention.out.weight_x_factor": torch.ones(5)}),
        lambda s: s.update({"embeddings.norm.weight": torch.ones(36).half()}),
    ],
)
def test_packed_files_whose_parts_do_not_fit_are_refused(change, tmp_path):
    drawn().for_inference("int8").save_pretrained(tmp_path)
    state = load_file(tmp_path / PACKED_FILE)
    change(state)
    about = {"format": FORMAT, "version": "1", "model": "BertModel", "dtype": "int8"}
    save_file(state, tmp_path / PACKED_FILE, metadata=about)
    with pytest.raises(CheckpointError, match=r"scales, or they do not fit|not float32"):
        bert_fast.BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_attention_heads", 6), ("hidden_act", "gelu_new"), ("layer_norm_eps", 1e-3)],
)
def test_a_packed_file_of_another_model_is_refused(name, value, tmp_path):
    """Also where every weight has the shape that config.json asks for."""
    drawn().for_inference("int8").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config[name] != value
    path.write_text(json.dumps({**config, name: value}))
    with pytest.raises(CheckpointError, match=rf"another model: of {name} .*, not {value} as"):
        bert_fast.BertModel.from_pretrained(tmp_path)


def test_packed_weights_are_not_saved_beside_others(tmp_path):
    drawn().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds model.safetensors"):
        drawn().for_inference("int8").save_pretrained(tmp_path)


def test_what_a_packed_model_cannot_do_is_said():
    model, inputs = drawn().for_inference("int8"), batch()
    wanted = last(model, *inputs)
    for change in (model.half, lambda: model.to("meta"), model.bfloat16):
        with pytest.raises(RuntimeError, match=r"packed this model for the CPU"):
            change()
    other = drawn()
    with torch.no_grad():
        other.embeddings.word.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"replaced this model's weights"):
        model.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"called before: the model is packed in int8"):
        model.for_inference("bfloat16")
    with bert_fast.use_backend("eager"), pytest.raises(RuntimeError, match=r"backend 'cpu'"):
        model(*inputs)
    assert torch.equal(last(model.float().cpu(), *inputs), wanted)


@pytest.mark.parametrize("dtype", ["float16", "fp8", torch.float64, None])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"dtype must be one of float32, bfloat16, int8"):
        drawn().for_inference(dtype)


def test_models_that_cannot_be_packed_are_refused():
    with pytest.raises(ValueError, match=r"float32 models on the CPU, not torch.bfloat16"):
        drawn().bfloat16().for_inference("int8")


@pytest.mark.parametrize("calibration", [[], [{"input_ids": torch.zeros(2, 0, dtype=torch.long)}]])
def test_calibration_on_no_texts_is_refused(calibration):
    model, inputs = drawn(), batch()
    wanted = last(model, *inputs).detach()
    with pytest.raises(ValueError, match=r"calibration needs texts"):
        model.for_inference("int8", calibration=calibration)
    torch.testing.assert_close(last(model, *inputs), wanted)  # as it was


def test_products_that_lose_much_stay_in_bfloat16(monkeypatch):
    assert {p.packed.precision for p in products(drawn().for_inference("int8"))} == {"int8"}
    monkeypatch.setattr(inference, "LIMIT", 0.0)
    wider = "bfloat16" if _C.linear_is_fast(1) else "float32"
    assert {p.packed.precision for p in products(drawn().for_inference("int8"))} == {wider}


def products(model):
    return [m for m in model.layers.modules() if isinstance(m, torch.nn.Linear)]


def test_a_channel_that_calibration_did_not_see():
    """Near zero in calibration, and then as large as the others: it may not take all the steps."""
    x, weight = torch.randn(300, 100), torch.randn(80, 100)
    x[:, 7] *= 1e-6
    observer = inference.Observer(weight)
    observer.forward(x, weight, None, None, torch.empty(300, 80), None)
    packed = observer.choose("weight")
    later = torch.randn(300, 100)
    out = packed.forward(later, weight, None, None, torch.empty(300, 80), inference.Workspace())
    assert distance(out, later @ weight.t()) < inference.LIMIT


def test_written_behind_the_back_of_the_one_call():
    """The layers one by one pack anew; then the one call may not use what it had."""
    model, inputs = drawn().prepack(), batch()
    with torch.no_grad():
        last(model, *inputs)
        for product in products(model):
            product.weight.data.mul_(2)
        wanted = model(*inputs, output_hidden_states=True).last_hidden_state
        assert torch.equal(last(model, *inputs), wanted)


def test_smoothing_evens_out_what_is_large_in_a_channel():
    """SmoothQuant's case: two of many channels are a hundred times the others."""
    x, weight = torch.randn(200, 256), torch.randn(64, 256)
    x[:, [3, 77]] *= 100
    exact = x @ weight.t()
    observer = inference.Observer(weight)
    observer.forward(x, weight, None, None, torch.empty_like(exact), None)
    errors = []
    for factor in (observer._x_factor(weight), None):
        packed = bert_fast.ops.pack_weight(weight, "int8", factor)
        out = packed.forward(x, weight, None, None, torch.empty_like(exact), inference.Workspace())
        errors.append(distance(out, exact))
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize(
    "kind", [transformers.BertModel, transformers.RobertaModel, transformers.DistilBertModel]
)
def test_accelerate(precision, kind):
    torch.manual_seed(torch.initial_seed())
    config = kind.config_class(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=40, initializer_range=0.2,
        dim=32, n_layers=2, n_heads=2, hidden_dim=64,
    )  # fmt: skip
    model, (ids, mask) = kind(config).eval(), batch((11, 4, 7, 1))
    with torch.no_grad():
        wanted = model(ids, mask).last_hidden_state * mask[..., None]
        bert_fast.accelerate(model, dtype=precision)
        found = model(ids, mask).last_hidden_state
        assert distance(found, wanted) < ALLOWED[precision]
        assert (precision == "float32") == (distance(found, wanted) < ALLOWED["float32"])
        kept = {name: p.clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():  # a changed weight is seen
            parameter.mul_(1.1)
        assert distance(model(ids, mask).last_hidden_state, found) > 1e-3
        model.load_state_dict(kept, strict=False)
        assert torch.equal(model(ids, mask).last_hidden_state, found)
    model(ids, mask).last_hidden_state.sum().backward()  # in float32, by the weights it keeps


def test_accelerate_keeps_its_precision_when_moved():
    model, (ids, mask) = transformers.BertModel(transformers.BertConfig(**SIZES)).eval(), batch()
    with torch.no_grad():
        plain = bert_fast.accelerate(model)(ids, mask).last_hidden_state
        served = bert_fast.accelerate(model, dtype="int8")(ids, mask).last_hidden_state
        assert not torch.equal(served, plain)
        model.double().float()
        assert torch.equal(model(ids, mask).last_hidden_state, served)
        bert_fast.accelerate(model, prepack=True)
        assert distance(model(ids, mask).last_hidden_state, plain) < ALLOWED["float32"]


def test_accelerate_says_which_products_it_leaves():
    class Other(torch.nn.Linear):
        pass

    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    model.encoder.layer[1].output.dense.__class__ = Other
    with pytest.warns(UserWarning, match=r"1 products .*layer.1.output.dense, a Other"):
        bert_fast.accelerate(model, dtype="bfloat16")


def test_accelerate_refuses_what_it_cannot_pack():
    model = transformers.BertModel(transformers.BertConfig(**SIZES))
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        bert_fast.accelerate(model, dtype="int8")
    with pytest.raises(ValueError, match=r"float32 models on the CPU; .* is torch.bfloat16"):
        bert_fast.accelerate(model.bfloat16().eval(), dtype="int8")
    with pytest.raises(ValueError, match=r"dtype must be one of"):
        bert_fast.accelerate(model.float(), dtype="int4")
    for call in (bert_fast.accelerate, lambda model, **options: drawn().for_inference(**options)):
        with pytest.raises(ValueError, match="calibration is for int8, not for bfloat16"):
            call(model, dtype="bfloat16", calibration=[])


def test_a_processor_without_the_instructions_is_said_once(monkeypatch):
    monkeypatch.setattr(inference, "_said", set())
    best = _C.cpu_isa()
    _C.set_cpu_isa("generic")
    try:
        with pytest.warns(UserWarning, match="no instruction for products in int8"):
            drawn().for_inference("int8")
        assert inference._said == {"int8"}
        inference._say_where_slow("int8")  # would be an error: warnings are
    finally:
        _C.set_cpu_isa(best)


def test_the_instruction_set_may_not_change_under_a_packed_model(tmp_path):
    """Nor what is saved: its bytes lie in another order. A pickle may come from another machine."""
    model, inputs = drawn().for_inference("int8"), batch()
    best = _C.cpu_isa()
    if best == "generic":
        pytest.skip("this processor has one instruction set")
    _C.set_cpu_isa("generic")
    try:
        other = pickle.loads(pickle.dumps(model))
        for changed in (model, other):
            with pytest.raises(RuntimeError, match="instruction set has changed"):
                changed(*inputs)
            with pytest.raises(RuntimeError, match="instruction set has changed"):
                changed.save_pretrained(tmp_path)
    finally:
        _C.set_cpu_isa(best)
    other.save_pretrained(tmp_path)
    again = bert_fast.BertModel.from_pretrained(tmp_path)
    assert torch.equal(last(again, *inputs), last(model, *inputs))
