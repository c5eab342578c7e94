"""Task heads against Hugging Face's: losses, outputs, gradients, checkpoints both ways."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import assert_within

import bert_fast
from bert_fast.models import checkpoint
from bert_fast.ops.cross_entropy import linear_cross_entropy

CONFIG = {
    "vocab_size": 61, "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 70, "max_position_embeddings": 24, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
BATCH, SEQLEN = 5, 13


def words(share=0.3):
    labels = torch.randint(61, (BATCH, SEQLEN))
    return labels.masked_fill(torch.rand(BATCH, SEQLEN) > share, -100)


def tags(mask):
    return torch.randint(4, (BATCH, SEQLEN)).masked_fill(mask == 0, -100)


# name: head, its configuration, labels
CASES = {
    "pre-training": ("ForPreTraining", {}, lambda mask: {
        "labels": words().masked_fill(mask == 0, -100),
        "next_sentence_label": torch.randint(2, (BATCH,))}),
    "masked-lm": ("ForMaskedLM", {}, lambda mask: {
        "labels": words().masked_fill(mask == 0, -100)}),
    "next-sentence": ("ForNextSentencePrediction", {}, lambda mask: {
        "labels": torch.randint(2, (BATCH,))}),
    "one-label": ("ForSequenceClassification", {"num_labels": 4}, lambda mask: {
        "labels": torch.randint(4, (BATCH,))}),
    "many-labels": ("ForSequenceClassification",
        {"num_labels": 4, "problem_type": "multi_label_classification"},
        lambda mask: {"labels": torch.randint(2, (BATCH, 4)).float()}),
    "regression": ("ForSequenceClassification", {"num_labels": 1}, lambda mask: {
        "labels": torch.randn(BATCH)}),
    "tokens": ("ForTokenClassification", {"num_labels": 4}, lambda mask: {"labels": tags(mask)}),
    "answers": ("ForQuestionAnswering", {}, lambda mask: {
        "start_positions": torch.tensor([1, 5, 12, 40, 0]),
        "end_positions": torch.tensor([3, 5, 12, 41, 9])}),
    "choice": ("ForMultipleChoice", {}, lambda mask: {"labels": torch.randint(2, (BATCH,))}),
}  # fmt: skip


def pair(tmp_path, head, config):
    theirs = getattr(transformers, f"Bert{head}")(transformers.BertConfig(**CONFIG, **config))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    theirs.save_pretrained(tmp_path)
    return theirs, getattr(bert_fast, f"Bert{head}").from_pretrained(tmp_path)


def inputs(head, padded):
    lengths = torch.tensor([13, 4, 9, 1, 12]) if padded else torch.full((BATCH,), SEQLEN)
    mask = (torch.arange(SEQLEN) < lengths[:, None]).long()
    batch = {
        "input_ids": torch.randint(1, 61, (BATCH, SEQLEN)), "attention_mask": mask,
        "token_type_ids": torch.randint(2, (BATCH, SEQLEN)),
    }  # fmt: skip
    if head == "ForMultipleChoice":
        batch = {k: torch.stack([v, v.flip(0)], dim=1) for k, v in batch.items()}
    return batch


@pytest.mark.parametrize("case", CASES)
def test_losses_outputs_and_gradients(tmp_path, case):
    head, config, labels = CASES[case]
    theirs, ours = pair(tmp_path, head, config)
    # The one difference: Hugging Face lets padding compete for an answer's ends.
    batch = inputs(head, padded=case != "answers")
    batch |= labels(batch["attention_mask"])
    plain = {k: v for k, v in batch.items() if "label" not in k and "positions" not in k}
    theirs.eval(), ours.eval()

    found, wanted = ours(**plain), theirs(**plain)
    real = plain["attention_mask"].bool()
    for name in ("logits", "prediction_logits", "seq_relationship_logits", "start_logits"):
        if (value := getattr(found, name, None)) is not None:
            other = getattr(wanted, name)
            assert value.shape == other.shape
            if value.shape[:2] == real.shape and case != "choice":
                value, other = value[real], other[real]
            assert (value - other).abs().max() < 2e-5

    def run(model, out):
        model.zero_grad()
        out.loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return out.loss.detach(), gradients

    loss, gradients = run(ours, ours(**batch))
    gradients = checkpoint.to_hugging_face(gradients)
    torchs_loss, torchs = run(theirs, theirs(**batch))
    torchs = {n: g.clone() for n, g in torchs.items()}
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    true_loss, truth = run(theirs.double(), theirs(**batch))
    assert_within([loss.view(1)], [torchs_loss.view(1)], [true_loss.view(1)], name=case)
    assert gradients.keys() == truth.keys()
    for key, value in truth.items():
        # Zero in exact arithmetic: all scores of a softmax move by the same.
        shifts = {"choice": "classifier.bias", "answers": "qa_outputs.bias"}
        if key.endswith("self.key.bias") or key == shifts.get(case):
            continue
        none = value.new_zeros(0)
        assert_within(
            [none.float(), gradients[key]], [none.float(), torchs[key]], [none, value], name=key
        )


@pytest.mark.parametrize("case", CASES)
def test_saved_where_hugging_face_loads(tmp_path, case):
    head, config, _ = CASES[case]
    theirs, ours = pair(tmp_path, head, config)
    ours.save_pretrained(tmp_path / "again")
    again, loading = type(theirs).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert again.config.num_labels == theirs.config.num_labels
    assert again.config.architectures == [f"Bert{head}"]
    for (name, a), b in zip(again.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_new_head_on_an_old_encoder_is_said(tmp_path):
    theirs, _ = pair(tmp_path, "ForMaskedLM", {})
    labels = {0: "rotten", 1: "fresh", 2: "neither"}
    with pytest.warns(UserWarning, match=r"bert\.pooler|classifier\.weight"):
        ours = bert_fast.BertForSequenceClassification.from_pretrained(tmp_path, id2label=labels)
    assert ours.classifier.out_features == 3
    assert ours.config.label2id == {"rotten": 0, "fresh": 1, "neither": 2}
    assert ours.classifier.weight.std() < 0.03
    ours.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert again.config.id2label == labels
    word = theirs.bert.embeddings.word_embeddings.weight
    assert torch.equal(ours.bert.embeddings.word.weight, word)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 1100])
def test_linear_cross_entropy(gradients, dtype, rows):
    inputs = [torch.randn(rows, 24), torch.randn(301, 24), torch.randn(301)]
    inputs = [t.to(dtype).double() for t in inputs]
    # A single loss may come out right by chance, so it is sixteen of them.
    several = torch.randint(301, (16, rows))

    def torchs(x, weight, bias):
        logits = F.linear(x, weight, bias)
        return torch.stack([F.cross_entropy(logits, labels) for labels in several]).double()

    def ours(x, weight, bias):
        losses = [linear_cross_entropy(x, weight, bias, labels)[0] for labels in several]
        return torch.stack(losses).double()

    one = torch.randn(16, dtype=torch.float64)
    truth = gradients(torchs, inputs, one, torch.float64)
    eager = gradients(torchs, inputs, one, dtype)
    assert_within(gradients(ours, inputs, one, dtype), eager, truth, name="loss, dx, dw, db")
    _, correct = linear_cross_entropy(*inputs, several[0])
    assert correct == (F.linear(*inputs).argmax(1) == several[0]).sum()


def test_ignored_rows(gradients):
    """As if they were not there, but for their gradient, which is zero; and torch's own checks."""
    inputs = [torch.randn(n, 24)[:n] for n in (40, 31)] + [torch.randn(31)]
    labels = torch.randint(31, (40,)).masked_fill(torch.rand(40) < 0.6, -100)
    kept = labels != -100
    x, weight, bias = (t.clone().requires_grad_() for t in inputs)
    loss, correct = linear_cross_entropy(x, weight, bias, labels, ignore=True)
    found = torch.autograd.grad(loss, (x, weight, bias))
    few, other = linear_cross_entropy(x[kept], weight, bias, labels[kept])
    wanted = torch.autograd.grad(few, (x, weight, bias))
    assert torch.equal(loss, few)
    assert correct == other
    assert all(map(torch.equal, found, wanted))
    arguments = x, weight, bias, labels, True, True
    torch.library.opcheck(torch.ops.bert_fast.linear_cross_entropy.default, arguments)
    (slope,) = torch.autograd.grad(
        linear_cross_entropy(x, weight, bias, labels, ignore=True)[0], x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="no second derivative"):
        slope.sum().backward()


@pytest.mark.parametrize("case", CASES)
def test_compiled_training_step(tmp_path, case):
    """Forward, loss and backward in one graph; masked words too, whose number is not known then."""
    head, config, labels = CASES[case]
    _, ours = pair(tmp_path, head, config)
    batch = inputs(head, padded=case != "answers")
    batch |= labels(batch["attention_mask"])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")

    def run(model, **extra):
        ours.zero_grad()
        loss = model(**batch, **extra).loss
        loss.backward()
        return loss.detach().view(1), [p.grad for p in ours.parameters() if p.grad is not None]

    loss, gradients = run(ours)
    found, traced = run(compiled)
    torch.testing.assert_close(found, loss)
    assert len(traced) == len(gradients)
    for a, b in zip(traced, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_nothing_is_masked(tmp_path):
    _, ours = pair(tmp_path, "ForMaskedLM", {})
    ids = torch.randint(61, (2, 5))
    loss = ours(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss == 0


def test_bad_labels_are_said(tmp_path):
    _, ours = pair(tmp_path, "ForMaskedLM", {})
    ids = torch.randint(61, (2, 5))
    with pytest.raises(ValueError, match=r"labels must be -100 or 0 to 60, not .* to 61"):
        ours(ids, labels=torch.full_like(ids, 61))
    with pytest.raises(ValueError, match="labels must be one a token, 10, not 5"):
        ours(ids, labels=ids[0])
    _, ours = pair(tmp_path, "ForMultipleChoice", {})
    with pytest.raises(ValueError, match=r"input_ids must be \(batch, choices, seqlen\)"):
        ours(ids)
