"""torch.autocast on the CPU: the dtypes that transformers' models give, and no worse numbers."""

import pytest
import torch
import transformers

import bert_fast

SIZES = {
    "vocab_size": 60, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 128, "max_position_embeddings": 20, "initializer_range": 0.1,
}  # fmt: skip
TWO = torch.tensor([0, 1])
LABELS = {
    "BertModel": {}, "BertForMaskedLM": {}, "BertForPreTraining": {},
    "BertForNextSentencePrediction": {"labels": TWO},
    "BertForSequenceClassification": {"labels": TWO},
    "BertForTokenClassification": {"labels": torch.arange(18).view(2, 9) % 2},
    "BertForQuestionAnswering": {"start_positions": TWO, "end_positions": TWO + 1},
}  # fmt: skip


def dtypes(out):
    return {
        name: [t.dtype for t in value] if isinstance(value, tuple) else value.dtype
        for name, value in out.items()
        if value is not None
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", LABELS)
def test_the_same_dtypes(tmp_path, kind, dtype):
    config = transformers.BertConfig(**SIZES)
    theirs = getattr(transformers, kind)(config).to(dtype).eval()
    theirs.save_pretrained(tmp_path)
    ours = getattr(bert_fast, kind).from_pretrained(tmp_path, dtype)
    ids, mask = torch.randint(1, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
    with torch.autocast("cpu", torch.bfloat16):
        for labels in {}, LABELS[kind]:
            wanted = theirs(**inputs, **labels)
            assert dtypes(ours(**inputs, **labels)._asdict()) == dtypes(wanted)
            found = bert_fast.accelerate(theirs)(**inputs, **labels)
            assert dtypes(found) == dtypes(wanted)
            bert_fast.restore(theirs)


def test_errors_like_theirs(tmp_path):
    """At most three times as large, both against float64."""
    theirs = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    theirs.save_pretrained(tmp_path)
    ours = bert_fast.BertModel.from_pretrained(tmp_path)
    truth = bert_fast.BertModel.from_pretrained(tmp_path, torch.float64)
    ids = torch.randint(1, 60, (4, 18))
    with torch.no_grad():
        wanted = truth(ids).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            found = [model(ids).last_hidden_state for model in (theirs, ours)]
            found.append(bert_fast.accelerate(theirs)(ids).last_hidden_state)
    allowed, *errors = ((out - wanted).square().mean().sqrt() for out in found)
    assert max(errors) <= 3 * allowed
