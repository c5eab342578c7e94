"""The thin BERT against Hugging Face's: outputs, losses, gradients, masks, packed input, memory."""

import copy
import pickle
import threading

import pytest
import torch
import transformers
from conftest import assert_gradients_within, assert_within, cu_seqlens

import bert_fast
from bert_fast.bench import data

CONFIGS = {
    "tiny": {
        "vocab_size": 60, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3,
        "intermediate_size": 70, "max_position_embeddings": 24,
    },
    "tanh": {
        "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 24, "hidden_act": "gelu_new",
    },
    "base": {"vocab_size": 500, "num_hidden_layers": 12},
    "large-width": {
        "vocab_size": 500, "hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}  # fmt: skip


def pair(tmp_path, name, dtype=torch.float32):
    """Hugging Face's model with random weights, and ours from its checkpoint."""
    config = transformers.BertConfig(**CONFIGS[name])
    theirs = transformers.BertModel(config)
    for parameter in theirs.parameters():  # biases and norms start as zeros and ones
        torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.05)
    theirs.save_pretrained(tmp_path)
    return theirs.to(dtype).eval(), bert_fast.BertModel.from_pretrained(tmp_path, dtype).eval()


def batch(vocab, lengths=(11, 3, 24, 1)):
    ids = torch.randint(1, vocab, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    types = torch.randint(0, 2, ids.shape)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_losses_and_gradients(tmp_path, name):
    """fp32 and ours against the same model in float64, by the ratio to Hugging Face's own error."""
    theirs, ours = pair(tmp_path, name)
    inputs = batch(CONFIGS[name]["vocab_size"])
    mask = inputs["attention_mask"][..., None]
    weights = torch.randn(*mask.shape[:2], theirs.config.hidden_size) * mask

    def run(model, dtype):
        out = model(**inputs)
        loss = (out.last_hidden_state * weights.to(dtype)).sum() + out.pooler_output.square().sum()
        model.zero_grad()
        loss.backward()
        hidden = (out.last_hidden_state * mask).detach()
        return [hidden, out.pooler_output.detach()], loss.detach()

    def named_gradients(model):
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found, loss = run(ours, torch.float32)
    gradients = bert_fast.models.checkpoint.to_hugging_face(named_gradients(ours))
    torchs, torchs_loss = run(theirs, torch.float32)
    torchs_gradients = named_gradients(theirs)
    torchs_gradients = {k: v.clone() for k, v in torchs_gradients.items()}
    truth, true_loss = run(theirs.double(), torch.float64)
    assert_within(found, torchs, truth, name="hidden, pooled")
    # The loss is one sum of many signs, and may come out near zero: its error is measured by what
    # was summed.
    summed = (truth[0] * weights).abs().sum() + truth[1].square().sum()
    assert (loss - true_loss).abs() < 1e-6 * summed
    assert (loss - torchs_loss).abs() < 1e-6 * summed
    assert (found[0] - torchs[0]).abs().max() < 2e-5
    assert_gradients_within(gradients, torchs_gradients, named_gradients(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_on", ["cpu", "device"])
def test_on_its_device(tmp_path, device, dtype, mask_on):
    theirs, ours = pair(tmp_path, "tiny")
    inputs = batch(60)
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        truth = copy.deepcopy(theirs).double()(**inputs).last_hidden_state[mask]
        there = {name: value.to(device) for name, value in inputs.items()}
        torchs = theirs.to(device, dtype)(**there).last_hidden_state[mask]
        if mask_on == "cpu":
            there["attention_mask"] = inputs["attention_mask"]
        found = ours.to(device, dtype)(**there).last_hidden_state
    assert found.device.type == device
    assert not found[~mask].any()
    assert_within(found[mask].cpu(), torchs.cpu(), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(tmp_path, dtype):
    theirs, ours = pair(tmp_path, "tiny", dtype)
    inputs = batch(60)
    mask = inputs["attention_mask"][..., None]
    with torch.no_grad():
        found = ours(**inputs).last_hidden_state
        torchs = theirs(**inputs).last_hidden_state * mask
        truth = theirs.double()(**inputs).last_hidden_state * mask
    assert_within(found, torchs, truth)


def test_real_weights(tmp_path):
    """all-MiniLM-L6-v2 on real reviews and plots, and back through save_pretrained."""
    directory = data.minilm()
    theirs = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    ours = bert_fast.BertModel.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    films = data.films()[:6]
    texts = [t for film in films for t in (film.plot, film.reviews[0])]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=200, return_tensors="pt")
    with torch.inference_mode():
        wanted = theirs(**inputs)
        found = ours(**inputs)
        mask = inputs["attention_mask"][..., None]
        assert 0.2 < mask.float().mean() < 0.9
        assert ((found[0] - wanted[0]) * mask).abs().max() < 2e-5
        assert (found[1] - wanted[1]).abs().max() < 2e-5
        ours.save_pretrained(tmp_path)
        again = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert torch.equal(again(**inputs)[0], wanted[0])


MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 1, 0, 1], [1, 1, 0, 0, 1]],
    "none real": [[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]],
    "nothing": [[0, 0, 0, 0, 0]] * 3,
}


@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("capacity", [None, 15])
@pytest.mark.parametrize("grad", [False, True])
def test_any_mask(tmp_path, pattern, capacity, grad):
    theirs, ours = pair(tmp_path, "tiny")
    mask = torch.tensor(MASKS[pattern])
    ids = torch.randint(1, 60, mask.shape)
    with torch.set_grad_enabled(grad):
        found = ours(ids, mask, capacity=capacity)
        wanted = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    real = mask.bool()
    torch.testing.assert_close(found[0][real], wanted[real], rtol=1e-4, atol=1e-5)
    assert found[0][~real].eq(0).all()
    some = real.any(1)
    first = wanted[torch.arange(3), mask.argmax(1)]
    pooled = torch.tanh(theirs.pooler.dense(first))
    torch.testing.assert_close(found[1][some], pooled[some], rtol=1e-4, atol=1e-5)
    assert found[1][~some].eq(0).all()
    for kind in (torch.bool, torch.float32, torch.int32):
        assert torch.equal(ours(ids, mask.to(kind), capacity=capacity)[0], found[0])


def test_hidden_states_and_position_ids(tmp_path):
    theirs, ours = pair(tmp_path, "tiny")
    inputs = batch(60)
    inputs["position_ids"] = torch.randint(0, 24, (1, 24))
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        wanted = theirs(**inputs, output_hidden_states=True)
        found = ours(**inputs, output_hidden_states=True)
    assert len(found.hidden_states) == len(wanted.hidden_states) == 4
    for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(a[mask], b[mask], rtol=1e-4, atol=1e-5)
    assert ours(**inputs).hidden_states is None


def test_packed_input_is_the_same(tmp_path):
    _, ours = pair(tmp_path, "tiny")
    inputs = batch(60)
    mask = inputs["attention_mask"].bool()
    padded = ours(**inputs)
    packed = ours(
        inputs["input_ids"][mask],
        token_type_ids=inputs["token_type_ids"][mask],
        cu_seqlens=cu_seqlens(mask.sum(1).tolist()),
    )
    torch.testing.assert_close(packed[0], padded[0][mask], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed[1], padded[1], rtol=1e-5, atol=1e-6)


def test_empty_batches(tmp_path):
    _, ours = pair(tmp_path, "tiny")
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            none = ours(torch.zeros(0, 7).long(), torch.zeros(0, 7).long())
            assert none[0].shape == (0, 7, 36)
            assert none[1].shape == (0, 36)
            assert ours(torch.zeros(3, 0).long())[1].eq(0).all()
            packed = ours(torch.zeros(0).long(), cu_seqlens=torch.tensor([0]).int())
            assert packed[0].shape == (0, 36)


def test_inference_and_training_paths_agree_and_inputs_survive(tmp_path):
    """Reused workspaces: results are not overwritten by the next call, inputs never."""
    _, ours = pair(tmp_path, "tiny")
    first, second = batch(60), batch(60, (5, 24))
    kept = {name: t.clone() for name, t in first.items()}
    trained = ours(**first)
    with torch.inference_mode():
        a = ours(**first)
        before = a[0].clone()
        ours(**second)
    with torch.no_grad():
        b = ours(**first)
    assert torch.equal(a[0], before)
    assert torch.equal(a[0], b[0])
    torch.testing.assert_close(a[0], trained[0], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(first[name], t) for name, t in kept.items())


def test_threads_do_not_share_workspaces(tmp_path):
    _, ours = pair(tmp_path, "tiny")
    batches = [batch(60, (20, 7)), batch(60, (24, 24, 3))]
    with torch.no_grad():
        wanted = [ours(**b)[0] for b in batches]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(ours(**batches[i])[0], wanted[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_deepcopy_pickle_and_dropout(tmp_path):
    _, ours = pair(tmp_path, "tiny")
    inputs = batch(60)
    with torch.no_grad():
        wanted = ours(**inputs)[0]
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(other(**inputs)[0], wanted)
        ours.train()
        torch.manual_seed(1)
        a = ours(**inputs)[0]
        b = ours(**inputs)[0]
        torch.manual_seed(1)
        assert torch.equal(a, ours(**inputs)[0])
    assert not torch.equal(a, b)


def test_training_step_learns(tmp_path):
    """A few steps on one batch: the loss falls, every parameter moves."""
    _, ours = pair(tmp_path, "tiny")
    ours.train()
    inputs, target = batch(60), torch.randn(4, 36)
    before = [p.detach().clone() for p in ours.parameters()]
    optimizer, losses = torch.optim.AdamW(ours.parameters(), lr=1e-3), []
    for _ in range(60):
        loss = (ours(**inputs).pooler_output - target.tanh()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert not any(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))


BAD = [
    ({"input_ids": torch.tensor([[1, 60]])}, ValueError, "input_ids holds 60"),
    ({"input_ids": torch.tensor([[-1, 6]])}, ValueError, "input_ids holds -1"),
    ({"input_ids": torch.zeros(1, 2)}, TypeError, "input_ids must be an int64"),
    ({"input_ids": torch.zeros(2).long()}, ValueError, "input_ids must be .batch, seqlen."),
    ({"input_ids": torch.ones(1, 25).long()}, ValueError, "25 tokens; the model has 24"),
    ({"token_type_ids": torch.tensor([[0, 2]])}, ValueError, "token_type_ids holds 2"),
    ({"token_type_ids": torch.tensor([[0]])}, ValueError, "token_type_ids must have input_ids'"),
    ({"position_ids": torch.tensor([[0, 24]])}, ValueError, "position_ids holds 24"),
    (
        {"attention_mask": torch.ones(1, 3).long()},
        ValueError,
        "attention_mask must have input_ids'",
    ),
    ({"attention_mask": torch.tensor([[1, 5]])}, ValueError, "ones and zeros alone"),
    ({"attention_mask": [[1, 1]]}, TypeError, "attention_mask must be a tensor"),
    ({"capacity": 2}, ValueError, "capacity needs an attention_mask"),
    ({"cu_seqlens": torch.tensor([0, 2]).int()}, ValueError, "cu_seqlens is for packed input"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input(change, error, message):
    model = bert_fast.BertModel(bert_fast.BertConfig(**CONFIGS["tiny"]))
    with pytest.raises(error, match=message):
        model(**({"input_ids": torch.tensor([[1, 2]])} | change))


def test_bad_packed_input():
    model = bert_fast.BertModel(bert_fast.BertConfig(**CONFIGS["tiny"]))
    with pytest.raises(ValueError, match="cu_seqlens ends at 3"):
        model(torch.tensor([1, 2]), cu_seqlens=torch.tensor([0, 3]).int())
    with pytest.raises(ValueError, match="30 tokens; the model has 24"):
        model(torch.ones(30).long(), cu_seqlens=torch.tensor([0, 30]).int())
