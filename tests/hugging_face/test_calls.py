"""Ways of calling an accelerated model: tuples, tracing, compiling, exporting, offloading."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
import transformers
from small_models import batch, bert, other_norm, said, same
from torch.utils._pytree import tree_flatten

import bert_fast
from bert_fast.hugging_face import families


def test_tuples(attention):
    theirs = bert()
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    inputs = batch()
    for options in ({"return_dict": False}, {"return_dict": False, "output_hidden_states": True}):
        with torch.no_grad():
            found, wanted = ours(**inputs, **options), theirs(**inputs, **options)
        assert type(found) is tuple
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            if isinstance(other, tuple):
                for a, b in zip(one, other, strict=True):
                    same(a, b, inputs["attention_mask"])
            else:
                same(one, other, inputs["attention_mask"] if one.ndim == 3 else None)
    theirs.config.return_dict = ours.config.return_dict = False
    with torch.no_grad():
        assert type(ours(**inputs)) is type(theirs(**inputs))
    assert attention


@pytest.mark.parametrize("name", sorted({family.output for family in families.FAMILIES.values()}))
def test_encoders_output_is_what_its_class_makes(name):
    kind, x = getattr(transformers.modeling_outputs, name), torch.randn(2, 3, 4)
    found, wanted = families.output_of(kind, x), kind(last_hidden_state=x)
    assert type(found) is kind
    for out in (found, copy.copy(found)):
        assert out[0] is out["last_hidden_state"] is out.last_hidden_state is x
        assert out.to_tuple() == wanted.to_tuple()
        assert list(out.items()) == list(wanted.items())
        assert vars(out) == vars(wanted)
        assert dataclasses.asdict(out).keys() == dataclasses.asdict(wanted).keys()
    (leaf,), structure = tree_flatten(found)
    assert leaf is x
    assert structure == tree_flatten(wanted)[1]
    found.hidden_states = (x,)
    assert list(found) == ["last_hidden_state", "hidden_states"]
    other = families.output_of(kind, -x)
    assert other.hidden_states is None  # each has its own
    assert list(other) == ["last_hidden_state"]
    assert torch.equal(pickle.loads(pickle.dumps(other)).last_hidden_state, -x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace():
    """A traced program holds for other lengths and masks, so it is transformers'."""
    theirs = bert(attn_implementation="eager", return_dict=False)
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    first, other = batch(), batch((6, 11, 2))
    with torch.no_grad():
        traced = torch.jit.trace(ours, tuple(first.values()))
        same(traced(*other.values())[0], theirs(**other)[0], other["attention_mask"])
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)


@pytest.mark.parametrize("masked", [True, False])
def test_compile_makes_one_graph(masked):
    theirs = bert()
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((11, 4, 7), (9, 3), (5, 5, 5, 2)):
        inputs = batch(lengths)
        if not masked:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        given = inputs if masked else {"input_ids": inputs["input_ids"]}
        with torch.no_grad():
            same(compiled(**given)[0], theirs(**given)[0], inputs["attention_mask"])
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.full
def test_onnx_export(tmp_path):
    pytest.importorskip("onnxscript", reason="the package onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    theirs = bert()
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    first, other = batch(), batch((6, 11, 2))
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(
        ours, tuple(first.values()), path, dynamo=True, verbose=False,
        input_names=["input_ids", "attention_mask"], output_names=["hidden", "pooled"],
    )  # fmt: skip
    session = runtime.InferenceSession(path)
    found = session.run(None, {name: value.numpy() for name, value in other.items()})[0]
    with torch.no_grad():
        wanted = theirs(**other)[0]
    same(torch.from_numpy(found), wanted, other["attention_mask"])


def test_offloaded_by_accelerate(attention, tmp_path):
    hf = pytest.importorskip("accelerate", reason="the package accelerate is not installed")
    theirs, inputs = bert(), batch()
    for when in ("before", "after"):
        ours = copy.deepcopy(theirs)
        if when == "before":
            hf.cpu_offload(ours, execution_device="cpu")
        messages = said(lambda model=ours: bert_fast.accelerate(model))
        if when == "after":
            hf.cpu_offload(ours, execution_device="cpu")
        messages += said(lambda model=ours: model(**inputs))
        with torch.no_grad():
            same(ours(**inputs)[0], theirs(**inputs)[0], inputs["attention_mask"])
        assert len(messages) == 1, when
        families.warn_once.cache_clear()
    assert not attention


def test_other_dtypes_and_saving_afterwards(attention, tmp_path):
    theirs = bert()
    ours = bert_fast.accelerate(copy.deepcopy(theirs), prepack=True)
    inputs = batch()
    with torch.no_grad():
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            ours.to(dtype), theirs.to(dtype)
            found = ours(**inputs)[0]
            assert found.dtype == dtype
            same(found.float(), theirs(**inputs)[0].float(), inputs["attention_mask"],
                 atol=0.1 if dtype == torch.bfloat16 else 2e-5)  # fmt: skip
    ours.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is transformers.BertModel
    with torch.no_grad():
        same(ours(**inputs)[0], again(**inputs)[0], inputs["attention_mask"])
    assert attention


def test_compiled_with_another_module_inside():
    """What is left to transformers is so in a compiled program, too."""
    theirs = bert()
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    for model in (theirs, ours):
        other_norm(model)
    compiled = torch.compile(ours, backend="eager")
    inputs = batch()
    with torch.no_grad():
        same(compiled(**inputs)[0], theirs(**inputs)[0], inputs["attention_mask"])
    torch._dynamo.reset()


@pytest.mark.parametrize("where", ["embeddings", "encoder", "encoder.layer.1"])
def test_a_break_of_the_graph(where):
    """The padding is not attended to, whichever parts are compiled."""
    theirs = bert()
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    module = ours.get_submodule(where)
    kind = type(module)

    class Broken(kind):
        def forward(self, *args, **kwargs):
            torch._dynamo.graph_break()
            return super().forward(*args, **kwargs)

    module.__class__ = Broken
    compiled = torch.compile(ours, backend="eager")
    for lengths in ((11, 4, 7), (9, 3)):
        inputs = batch(lengths)
        with torch.no_grad():
            same(compiled(**inputs)[0], theirs(**inputs)[0], inputs["attention_mask"])
            same(ours(**inputs)[0], theirs(**inputs)[0], inputs["attention_mask"])
    torch._dynamo.reset()


@pytest.mark.parametrize("prepack", [False, True])
def test_an_encoder_compiled_by_itself_is_left_to_transformers(prepack):
    """What hands it the real tokens is not in its graph."""
    theirs, inputs = bert(), batch()
    families.warn_once.cache_clear()
    ours = bert_fast.accelerate(copy.deepcopy(theirs), prepack=prepack)
    with torch.no_grad():
        ours(**inputs)
        ours.encoder.compile(backend="eager")
        with pytest.warns(UserWarning, match="the encoder, which is compiled by itself"):
            found = ours(**inputs)[0]
        same(found, theirs(**inputs)[0], inputs["attention_mask"])
    torch._dynamo.reset()


def test_a_part_that_is_not_compiled():
    theirs = bert()
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    encoder = ours.encoder
    encoder.__class__ = type(
        "Plain", (type(encoder),), {"forward": torch._dynamo.disable(type(encoder).forward)}
    )
    compiled = torch.compile(ours, backend="eager")
    inputs = batch()
    with torch.no_grad():
        same(compiled(**inputs)[0], theirs(**inputs)[0], inputs["attention_mask"])
        same(ours(**inputs)[0], theirs(**inputs)[0], inputs["attention_mask"])
    torch._dynamo.reset()
