"""transformers' Trainer with our own heads: it trains them as it trains transformers' model."""

import numpy as np
import pytest
import torch
import transformers

import bert_fast

SIZES = dict(
    vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=48, max_position_embeddings=20, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)  # fmt: skip
HEADS = ["SequenceClassification", "TokenClassification", "MaskedLM", "QuestionAnswering"]


class Rows(torch.utils.data.Dataset):
    """Rows of one length, with a column that no model takes."""

    def __init__(self, head, count=12):
        self.rows = []
        for _ in range(count):
            ids = torch.randint(1, 40, (9,))
            row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            some = torch.where(torch.rand(9) < 0.6, ids % 3, -100)
            some[0] = 1  # at least one label a row
            if head == "SequenceClassification":
                row["labels"] = torch.tensor(int(ids[0]) % 3)
            elif head == "QuestionAnswering":
                row |= {"start_positions": ids[0] % 5, "end_positions": ids[1] % 9}
            else:
                row["labels"] = some
            self.rows.append({**row, "text": "which the model does not take"})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


@pytest.mark.filterwarnings("ignore:.*newly initialised.*", "ignore::UserWarning")
@pytest.mark.parametrize("head", HEADS)
def test_trainer(tmp_path, head):
    """The same losses and weights, with gradients added up over batches of unlike many labels; and
    an evaluation whose predictions are arrays."""
    labels = 2 if head == "QuestionAnswering" else 3
    config = transformers.BertConfig(**SIZES, num_labels=labels)
    theirs = getattr(transformers, f"BertFor{head}")(config)
    theirs.save_pretrained(tmp_path / "base")
    ours = getattr(bert_fast, f"BertFor{head}").from_pretrained(tmp_path / "base")
    rows, seen = Rows(head), {}
    for name, model in (("theirs", theirs), ("ours", ours)):
        arguments = transformers.TrainingArguments(
            str(tmp_path / name), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
            gradient_accumulation_steps=2, report_to="none", save_strategy="no", use_cpu=True,
            disable_tqdm=True, logging_steps=1, seed=3, optim="sgd", lr_scheduler_type="constant",
            label_names=["start_positions", "end_positions"]
            if head == "QuestionAnswering" else ["labels"],
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        if name == "theirs" and head != "QuestionAnswering":
            # transformers' BERT takes the number of labels and does not use it: this does.
            trainer.compute_loss_func = by_all_labels
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        seen[name] = losses, trainer.predict(rows) if head != "MaskedLM" else None
    assert len(seen["ours"][0]) == 3
    if head != "QuestionAnswering":
        np.testing.assert_allclose(seen["ours"][0], seen["theirs"][0], rtol=2e-3)
    if head in ("SequenceClassification", "TokenClassification"):
        found, wanted = seen["ours"][1].predictions, seen["theirs"][1].predictions
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)


def by_all_labels(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"]
    total = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum"
    )
    return total / (num_items_in_batch or (labels != -100).sum())


def test_slices_leave_out_what_is_none():
    model = bert_fast.BertForSequenceClassification(bert_fast.BertConfig(**SIZES)).eval()
    ids = torch.randint(1, 40, (2, 5))
    out = model(ids)
    assert out.loss is None
    assert out[0] is None
    assert [type(t) for t in out[1:]] == [torch.Tensor]
    assert len(model(ids, output_hidden_states=True)[1:]) == 2
    with pytest.raises(TypeError, match="unexpected keyword argument 'sharpness'"):
        model(ids, sharpness=3)
