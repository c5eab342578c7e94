"""Which model a task has: every family that ``accelerate`` takes, and labels as people have them.
Predictions are compared with transformers' own model on the same ids."""

import json

import pytest
import torch
import transformers

import bert_fast
from bert_fast.cli import main
from bert_fast.training.finetune import Settings, Tuned, finetune

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "good",
    "bad",
    "film",
    "plot",
    "it",
    "is",
]
SIZES = dict(
    vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=40, initializer_range=0.3,
)  # fmt: skip
DISTIL = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
          "intermediate_size": "hidden_dim"}  # fmt: skip
FAMILIES = {
    "Bert": {},
    "Roberta": {"pad_token_id": 0, "type_vocab_size": 1},
    "XLMRoberta": {"pad_token_id": 0, "type_vocab_size": 1},
    "Camembert": {"pad_token_id": 0, "type_vocab_size": 1},
    "Electra": {"embedding_size": 32},
    "DistilBert": {},
    "MPNet": {"pad_token_id": 0},
}
TEXTS = ["a good film", "it is a bad plot", "good", "bad film it is bad"]


def checkpoint(directory, family="Bert", head="ForSequenceClassification", **config):
    """transformers' model, saved with a tokenizer."""
    sizes = dict(SIZES)
    if family == "DistilBert":
        sizes = {DISTIL.get(name, name): value for name, value in sizes.items()}
    made = getattr(transformers, f"{family}Config")(**{**sizes, **FAMILIES[family], **config})
    model = getattr(transformers, f"{family}{head}")(made).eval()
    model.save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return model


def theirs_on(model, tuned):
    encodings = tuned.tokenizer.encode_batch(TEXTS)
    with torch.no_grad():
        return [model(torch.tensor([e.ids])).logits[0] for e in encodings]


def predict(directory, tmp_path, *options):
    rows, out = tmp_path / "rows.txt", tmp_path / "predictions.jsonl"
    rows.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    words = ["predict", "--model", str(directory), "--rows", str(rows), "--out", str(out)]
    assert main([*words, "--overwrite", *options]) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_of_each_family(tmp_path, family):
    model = checkpoint(tmp_path, family, id2label={0: "bad", 1: "good", 2: "so"}, num_labels=3)
    found = predict(tmp_path, tmp_path)
    tuned = Tuned.from_pretrained(tmp_path)
    for row, logits in zip(found, theirs_on(model, tuned), strict=True):
        wanted = torch.softmax(logits, 0).tolist()
        assert list(row["scores"]) == ["bad", "good", "so"]
        assert list(row["scores"].values()) == pytest.approx(wanted, abs=2e-6)
        assert row["label"] == ["bad", "good", "so"][logits.argmax()]


@pytest.mark.parametrize("family", ["Roberta", "DistilBert"])
@pytest.mark.parametrize("task", ["classification", "ner"])
def test_finetuning_another_family(tmp_path, family, task):
    """Is saved as that family, and transformers reads it."""
    base = tmp_path / "base"
    base.mkdir()
    checkpoint(base, family, head="Model")
    rows = tmp_path / "rows.jsonl"
    examples = [("a good film", "yes"), ("a bad film", "no"), ("it is good", "yes"), ("bad", "no")]
    with rows.open("w", encoding="utf-8") as file:
        for text, label in examples * 8:
            words = text.split()
            tags = ["X" if word in ("good", "bad") else "O" for word in words]
            row = {"text": text, "label": label} if task == "classification" else {
                "words": words, "tags": tags}  # fmt: skip
            file.write(json.dumps(row) + "\n")
    settings = Settings(
        task, str(base), str(rows), str(tmp_path / "out"), test=str(rows), epochs=1, lr=3e-3,
        batch_tokens=200,
    )  # fmt: skip
    tuned, figures = finetune(settings)
    assert 0 <= figures["accuracy"] <= 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] in (
        "roberta", "distilbert")  # fmt: skip
    head = "SequenceClassification" if task == "classification" else "TokenClassification"
    again = getattr(transformers, f"AutoModelFor{head}").from_pretrained(tmp_path / "out").eval()
    assert set(again.config.label2id) == ({"yes", "no"} if task == "classification" else {"X", "O"})
    ids = torch.tensor([tuned.tokenizer.encode("a good film").ids])
    with torch.no_grad():
        torch.testing.assert_close(
            again(ids).logits, tuned.model.eval()(ids).logits, rtol=0, atol=1e-5
        )
    assert Tuned.from_pretrained(tmp_path / "out").task.labels == tuned.task.labels


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_one_logit_is_a_score(tmp_path, family):
    """A cross-encoder: never LABEL_0 with a share of 1."""
    model = checkpoint(tmp_path, family, num_labels=1)
    found = predict(tmp_path, tmp_path)
    scores = [row["score"] for row in found]
    wanted = [logits.item() for logits in theirs_on(model, Tuned.from_pretrained(tmp_path))]
    assert scores == pytest.approx(wanted, abs=5e-6)
    assert len(set(scores)) == len(TEXTS)


@pytest.mark.parametrize("labels", [2, 3])
def test_labels_without_names(tmp_path, labels):
    model = checkpoint(tmp_path, num_labels=labels)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for name in ("id2label", "label2id"):
        values.pop(name, None)
    path.write_text(json.dumps(values))
    names = [f"LABEL_{i}" for i in range(labels)]
    found = predict(tmp_path, tmp_path)
    wanted = theirs_on(model, Tuned.from_pretrained(tmp_path))
    for row, logits in zip(found, wanted, strict=True):
        assert list(row["scores"]) == names
        assert row["label"] == names[logits.argmax()]


def test_multi_label_by_its_problem_type(tmp_path):
    model = checkpoint(tmp_path, num_labels=3, problem_type="multi_label_classification")
    found = predict(tmp_path, tmp_path)
    wanted = theirs_on(model, Tuned.from_pretrained(tmp_path))
    for row, logits in zip(found, wanted, strict=True):
        assert list(row["scores"].values()) == pytest.approx(
            torch.sigmoid(logits).tolist(), abs=2e-6
        )


def test_what_is_no_tasks_model(tmp_path):
    checkpoint(tmp_path, head="ForMaskedLM")
    with pytest.raises(bert_fast.CheckpointError, match="ForMaskedLM, which is no task's"):
        Tuned.from_pretrained(tmp_path)
    transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9)
    ).save_pretrained(tmp_path)
    with pytest.raises(bert_fast.CheckpointError, match="holds none of transformers'"):
        Tuned.from_pretrained(tmp_path)
