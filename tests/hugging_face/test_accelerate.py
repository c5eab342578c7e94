"""accelerate and restore: every family and head of Hugging Face's, before and after."""

import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from conftest import assert_gradients_within, assert_within

import bert_fast
from bert_fast.bench import data
from bert_fast.hugging_face import families

SIZES = {
    "vocab_size": 90, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3,
    "intermediate_size": 70, "max_position_embeddings": 40,
}  # fmt: skip
FAMILIES = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "XLMRoberta": SIZES,
    "Camembert": SIZES,
    "Electra": SIZES | {"embedding_size": 20, "hidden_act": "gelu_new"},
    "DistilBert": {"vocab_size": 90, "dim": 36, "n_layers": 3, "n_heads": 3, "hidden_dim": 70,
                   "max_position_embeddings": 40},
    "MPNet": SIZES,
}  # fmt: skip
HEADS = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification",
         "ForQuestionAnswering", "ForMultipleChoice"]  # fmt: skip
LENGTHS = [11, 3, 7, 1]


def build(family, head="Model", **config):
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family], **config)
    model = getattr(transformers, f"{family}{head}")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return model


def batch(model, head="Model", lengths=LENGTHS):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 90, mask.shape)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if head == "ForMultipleChoice":
        other = {"input_ids": torch.randint(5, 90, mask.shape), "attention_mask": mask.flip(0)}
        inputs = {k: torch.stack([v, other[k]], 1) for k, v in inputs.items()}
    hidden = inputs["attention_mask"] == 0
    inputs["input_ids"] = inputs["input_ids"].masked_fill(hidden, model.config.pad_token_id)
    return inputs


def real(value, inputs):
    """The part of an output that is about real tokens."""
    mask = inputs["attention_mask"].bool()
    return value[mask] if value.shape[: mask.ndim] == mask.shape else value


def near(found, wanted, inputs):
    return (real(found, inputs) - real(wanted, inputs)).abs().max() < 2e-5


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients(family, head):
    theirs = build(family, head)
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert type(ours).__name__ == type(theirs).__name__
    # Enough sequences that the few numbers of a head are no matter of luck.
    inputs = batch(theirs, head, [*LENGTHS, 5, 9, 2, 8, 11, 4, 6, 10])
    with torch.no_grad():
        wanted = theirs(**inputs, output_hidden_states=True)
        for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            found = model(**inputs, output_hidden_states=True)
            assert type(found) is type(wanted)
            assert found.keys() == wanted.keys()
            assert near(found[0], wanted[0], inputs)
            for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True):
                flat = {"attention_mask": inputs["attention_mask"].reshape(-1, b.shape[1])}
                assert near(a, b, flat)
            assert torch.equal(model(**inputs)[0], found[0])
            assert torch.equal(model(**inputs, return_dict=False)[0], found[0])

    weights = torch.randn_like(real(wanted[0], inputs)).double()

    def run(model):
        model.zero_grad()
        out = real(model(**inputs)[0], inputs)
        (out * weights.to(out.dtype)).sum().backward()
        named = model.named_parameters()
        return out.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}

    found, gradients = run(ours)
    torchs, eager = run(theirs)
    truth, exact = run(theirs.double())
    assert_within(found, torchs, truth)
    assert_gradients_within(gradients, eager, exact)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask_on", ["cpu", "device"])
def test_on_its_device(family, device, mask_on):
    theirs = build(family)
    ours = bert_fast.accelerate(copy.deepcopy(theirs)).to(device)
    here = batch(theirs, lengths=[*LENGTHS, 5, 9])
    weights = torch.randn(*here["input_ids"].shape, 36).double()

    def run(model, inputs):
        model.zero_grad()
        out = model(**inputs)[0].cpu()
        (real(out, here) * real(weights, here).to(out.dtype)).sum().backward()
        return [real(out, here).detach(), model.get_input_embeddings().weight.grad.cpu()]

    truth = run(copy.deepcopy(theirs).double(), here)
    there = {name: value.to(device) for name, value in here.items()}
    torchs = run(theirs.to(device), there)
    if mask_on == "cpu":
        there["attention_mask"] = here["attention_mask"]
    assert_within(run(ours, there), torchs, truth, name="output, gradient of word embeddings")


@pytest.mark.parametrize("family", FAMILIES)
def test_restored(family):
    theirs = build(family)
    ours = bert_fast.accelerate(copy.deepcopy(theirs), prepack=True)
    inputs = batch(theirs)
    with torch.no_grad():
        assert near(ours(**inputs)[0], theirs(**inputs)[0], inputs)
        assert bert_fast.accelerate(ours) is ours  # twice is once
        assert bert_fast.restore(ours) is ours
        assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
        assert all(m.__dict__.keys() == n.__dict__.keys()
                   for m, n in zip(ours.modules(), theirs.modules(), strict=True))  # fmt: skip
        assert torch.equal(ours(**inputs)[0], theirs(**inputs)[0])


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_the_same_dropout_rates_and_layers_that_keep_no_activations(family):
    """Each of Hugging Face's dropouts does something; checkpointed layers give the same bits."""
    ours = bert_fast.accelerate(build(family)).train()
    inputs = batch(ours)
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    still = ours(**inputs)[0]
    assert torch.equal(ours(**inputs)[0], still)
    for name, module in ours.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
            assert not torch.equal(ours(**inputs)[0], still), name
            module.p = 0.0

    def gradients():
        ours.zero_grad()
        ours(**inputs)[0].square().sum().backward()
        return [p.grad.clone() for p in ours.parameters() if p.grad is not None]

    kept = gradients()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(a, b) for a, b in zip(gradients(), kept, strict=True))


def test_saved_and_trained(tmp_path):
    """save_pretrained as before; an optimizer made before accelerate trains the same parameters."""
    model = build("Bert", "ForSequenceClassification", num_labels=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.save_pretrained(tmp_path / "before")
    bert_fast.accelerate(model, prepack=True)
    model.save_pretrained(tmp_path / "after")
    for name in ("model.safetensors", "config.json"):
        before, after = (tmp_path / when / name for when in ("before", "after"))
        assert before.read_bytes() == after.read_bytes()
    inputs = batch(model) | {"labels": torch.tensor([0, 1, 0, 1])}
    losses = []
    for _ in range(25):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    with torch.no_grad():  # the packed weights followed
        found = model.eval()(**inputs).logits
        assert near(found, bert_fast.restore(model)(**inputs).logits, inputs)


def test_trainer(tmp_path):
    model = bert_fast.accelerate(build("Bert", "ForSequenceClassification", num_labels=2))
    rows = [{k: v[i % 4] for k, v in batch(model).items()} | {"labels": i % 2} for i in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=1, per_device_train_batch_size=4, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    before = model.classifier.weight.clone()
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    assert not torch.equal(before, model.classifier.weight)


def test_what_is_left_to_transformers():
    """Said once, and computed by the original code."""
    theirs = build("Bert")
    theirs.set_attn_implementation("eager")
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    inputs = batch(theirs)
    families.warn_once.cache_clear()
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = ours(**inputs, output_attentions=True)
        ours(**inputs, output_attentions=True)
        wanted = theirs(**inputs, output_attentions=True)
    said = [str(w.message) for w in said if "bert_fast" in str(w.message)]
    assert said == ["bert_fast leaves BertModel to transformers in calls with output_attentions"]
    assert torch.equal(found.attentions[2], wanted.attentions[2])
    pairs = inputs["attention_mask"][:, None, None, :].bool()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = pairs.expand(-1, 1, 11, -1)
        if transformers.__version__ < "5":
            pairs = pairs[:, 0]
        by_pair = inputs | {"attention_mask": pairs}
        assert torch.equal(ours(**by_pair)[0], theirs(**by_pair)[0])


def test_what_cannot_be_accelerated_is_said():
    with pytest.raises(ValueError, match=r"Linear holds none of transformers' BertModel, Roberta"):
        bert_fast.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="BertModel cannot be accelerated: it is a decoder"):
        bert_fast.accelerate(build("Bert", is_decoder=True))
    with pytest.raises(ValueError, match="hidden_act is 'relu', not one of gelu"):
        bert_fast.accelerate(build("Bert", hidden_act="relu"))
    ours = bert_fast.accelerate(build("Bert"))
    with pytest.raises(ValueError, match=r"specify .* input_ids or inputs_embeds"):
        ours()
    with pytest.raises(ValueError, match=r"attention_mask must have the input's shape \(1, 3\)"):
        ours(torch.ones(1, 3).long(), torch.ones(1, 4))


@pytest.mark.parametrize("lengths", [LENGTHS, [6, 6, 6]])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "MPNet"])
def test_attention_alone(family, lengths):
    """attn_implementation="bert_fast"."""
    model = build(family)
    inputs = batch(model, lengths=lengths)
    with torch.no_grad():
        wanted = model(**inputs)[0]
        model.set_attn_implementation("bert_fast")
        assert near(model(**inputs)[0], wanted, inputs)


def test_sentence_transformer(tmp_path):
    """The same embeddings on real text, from a real checkpoint."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(data.minilm()), device="cpu")
    texts = [text for film in data.films()[:4] for text in (film.plot, film.reviews[0])]
    wanted = encoder.encode(texts, convert_to_tensor=True)
    bert_fast.accelerate(encoder, prepack=True)
    assert (encoder.encode(texts, convert_to_tensor=True) - wanted).abs().max() < 2e-5


@pytest.mark.full
def test_with_transformers_4(tmp_path):
    """This file again, and those of heads and checkpoints, with the last transformers before 5."""
    packages = ["transformers==4.57.6", "sentence-transformers<5.2", "huggingface-hub<1.0",
                "tokenizers<0.23.1", "requests", "urllib3", "idna", "certifi",
                "charset-normalizer"]  # fmt: skip
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path]
    subprocess.run([*pip, *packages], check=True)
    tests = Path(__file__).parents[1]
    files = [tests / "models" / f"test_{n}.py" for n in ("heads", "encoder_decoder", "checkpoint")]
    files.append(tests / "training" / "test_finetune.py")
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not full and not gpu", __file__, *files],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout[-3000:]


def test_relative_positions_and_masks_with_holes():
    """MPNet's distances are those of columns: left padding keeps them, holes do not."""
    theirs = build("MPNet")
    ours = bert_fast.accelerate(copy.deepcopy(theirs))
    families.warn_once.cache_clear()
    inputs = batch(theirs)
    left = inputs["attention_mask"].flip(1)
    holes = (torch.rand(4, 11) < 0.6).long()
    holes[:, 0], holes[0, 4], holes[0, 5], holes[0, 6] = 1, 1, 0, 1
    for mask, said in ((left, 0), (holes, 1)):
        given = inputs | {"attention_mask": mask}
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert near(ours(**given)[0], theirs(**given)[0], given)
        assert len([w for w in caught if "a mask with holes" in str(w.message)]) == said
