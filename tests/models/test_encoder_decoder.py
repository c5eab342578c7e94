"""The encoder-decoder against Hugging Face's: losses, gradients, checkpoints; decoding with kept
keys and values against decoding that computes everything again."""

import pytest
import torch
import transformers
from conftest import assert_gradients_within, assert_within

import bert_fast
from bert_fast import BertConfig, EncoderDecoderModel
from bert_fast.files import CheckpointError
from bert_fast.models import checkpoint
from bert_fast.models.encoder_decoder import EncoderDecoderConfig

SIZES = {
    "vocab_size": 61, "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 70, "max_position_embeddings": 24, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
WORDS = 53  # to write with
START, END, PAD = 1, 2, 0
LENGTHS = [9, 3, 5, 1]


@pytest.fixture
def pair(tmp_path):
    """Hugging Face's and ours."""
    encoder = transformers.BertConfig(**SIZES)
    decoder = transformers.BertConfig(
        **SIZES | {"vocab_size": WORDS, "num_hidden_layers": 3}, is_decoder=True,
        add_cross_attention=True,
    )  # fmt: skip
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, decoder_start_token_id=START, eos_token_id=END, pad_token_id=PAD
    )
    theirs = transformers.EncoderDecoderModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    with torch.no_grad():  # a token that is never said would be hidden by transformers
        theirs.decoder.cls.predictions.bias[PAD] = -100
    theirs.save_pretrained(tmp_path)
    return theirs, EncoderDecoderModel.from_pretrained(tmp_path)


def batch(lengths=LENGTHS):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, SIZES["vocab_size"], mask.shape).masked_fill(mask == 0, PAD)
    return {"input_ids": ids, "attention_mask": mask}


def labels(lengths=(7, 4, 1, 6)):
    words = torch.randint(3, WORDS, (len(lengths), max(lengths)))
    return words.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], -100)


def test_losses_outputs_and_gradients(pair):
    theirs, ours = pair
    inputs, wanted = batch(), labels()
    texts = torch.randint(3, WORDS, (4, 7))
    mask = (torch.arange(7) < torch.tensor([7, 2, 4, 3])[:, None]).long()
    with torch.no_grad():
        a = theirs(**inputs, decoder_input_ids=texts, decoder_attention_mask=mask)
        b = ours(**inputs, decoder_input_ids=texts, decoder_attention_mask=mask)
        assert b.loss is None
        assert (a.logits - b.logits)[mask.bool()].abs().max() < 2e-5
        whole = ours(**inputs, decoder_input_ids=texts).logits
        assert (theirs(**inputs, decoder_input_ids=texts).logits - whole).abs().max() < 2e-5
        real = inputs["attention_mask"].bool()
        states = (a.encoder_last_hidden_state - b.encoder_last_hidden_state)[real]
        assert states.abs().max() < 2e-5

    def run(model, **more):
        model.zero_grad()
        loss = model(**inputs, labels=wanted, **more).loss
        loss.backward()
        named = model.named_parameters()
        return loss.detach().view(1), {n: p.grad.clone() for n, p in named if p.grad is not None}

    loss, gradients = run(ours)
    gradients = checkpoint.to_hugging_face(gradients)
    torchs_loss, torchs = run(theirs)
    try:
        torch.set_default_dtype(torch.float64)  # transformers 4 makes its masks in it
        true_loss, truth = run(theirs.double())
    finally:
        torch.set_default_dtype(torch.float32)
    assert_within([loss], [torchs_loss], [true_loss])
    assert_gradients_within(gradients, torchs, truth)


def test_saved_where_hugging_face_loads(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "again")
    again, said = transformers.EncoderDecoderModel.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    for (name, a), b in zip(again.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert again.config.decoder.is_decoder
    assert again.config.decoder.add_cross_attention
    assert again.config.decoder_start_token_id == START
    weights = again.decoder.cls.predictions.decoder.weight
    assert weights is again.decoder.bert.embeddings.word_embeddings.weight


def test_masks_change_nothing_but_time(pair):
    """Labels that are padded more give the same loss; so does a mask that torch cannot look at."""
    _, ours = pair
    inputs, wanted = batch(), labels()
    loss = ours(**inputs, labels=wanted).loss
    padded = torch.nn.functional.pad(wanted, (0, 9), value=-100)
    assert torch.allclose(ours(**inputs, labels=padded).loss, loss, rtol=1e-6)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)  # tracing sees no values
    assert torch.allclose(compiled(**inputs, labels=wanted).loss, loss, rtol=1e-6)


def uncached(model, inputs, most):
    """Greedy decoding in plain PyTorch, from the start for each token. Returns what is said, and by
    how little each token was ahead of the next best."""
    said = torch.full((len(inputs["input_ids"]), 1), START)
    margins = []
    with torch.no_grad(), bert_fast.use_backend("eager"):
        for _ in range(most):
            logits = model(**inputs, decoder_input_ids=said).logits[:, -1]
            top, best = logits.topk(2)
            ended = (said[:, 1:] == END).any(1)
            said = torch.cat([said, best[:, :1].masked_fill(ended[:, None], PAD)], 1)
            margins.append((top[:, 0] - top[:, 1]).masked_fill(ended, torch.inf))
    return said, torch.stack(margins, 1)


def upto_end(row):
    row = row.tolist()
    return row[: row.index(END) + 1] if END in row else row


def test_decoding_on_every_backend(pair, backend):
    """Token for token what decoding without a cache says; where a token was ahead of another by
    less than rounding, what follows may differ."""
    _, ours = pair
    device = torch.empty(0).device
    ours, inputs = ours.cpu(), {k: v.cpu() for k, v in batch().items()}
    with torch.device("cpu"):
        wanted, margins = uncached(ours, inputs, 7)
    found = ours.to(device).generate(
        **{k: v.to(device) for k, v in inputs.items()}, max_new_tokens=7
    ).cpu()  # fmt: skip
    for row, right, margin in zip(found, wanted, margins, strict=True):
        sure = (margin > 1e-4).long().cumprod(0).sum() + 1
        assert upto_end(row)[:sure] == upto_end(right)[:sure]


@pytest.mark.parametrize("length_penalty", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("num_beams", [1, 2, 5])
def test_beams_against_hugging_face(pair, num_beams, length_penalty):
    """The same beams. Scores as near as rounding may swap two, so not every sentence must agree."""
    theirs, ours = pair
    agree = total = 0
    for bias in (-2.0, 0.0, 2.0):  # ends come late or soon
        with torch.no_grad():
            theirs.decoder.cls.predictions.bias[END] = bias
            ours.decoder.cls.predictions.bias[END] = bias
        inputs = batch()
        found = ours.generate(
            **inputs, num_beams=num_beams, max_new_tokens=12, length_penalty=length_penalty
        )
        wanted = theirs.generate(
            **inputs, num_beams=num_beams, max_new_tokens=12, length_penalty=length_penalty,
            do_sample=False, decoder_start_token_id=START, eos_token_id=END, pad_token_id=PAD,
        )  # fmt: skip
        assert found.shape == wanted.shape
        for a, b in zip(found, wanted, strict=True):
            agree, total = agree + (upto_end(a) == upto_end(b)), total + 1
    assert agree >= total - 1


def test_sentences_that_end_cost_nothing(pair, monkeypatch):
    """Each step computes the sentences that go on, and no other."""
    _, ours = pair
    seen, forward = [], type(ours.decoder.bert.layers[0].feed_forward).forward
    kind = type(ours.decoder.bert.layers[0].feed_forward)
    monkeypatch.setattr(
        kind, "forward", lambda self, x, w: (seen.append(len(x)), forward(self, x, w))[1]
    )
    with torch.no_grad():
        ours.decoder.cls.predictions.bias[END] = 4.0
    said = ours.generate(**batch([5] * 12), max_new_tokens=20)
    steps = [len(upto_end(row)) - 1 for row in said]
    per_step = [sum(length > t for length in steps) for t in range(max(steps))]
    assert seen[2:] == [n for n in per_step for _ in range(3)]  # 2 encoder layers, 3 decoder layers


def test_new_decoder_on_an_old_encoder(tmp_path):
    bert_fast.BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
    model = EncoderDecoderModel.from_encoder_pretrained(
        tmp_path, BertConfig(**SIZES | {"vocab_size": WORDS}), decoder_start_token_id=START,
        eos_token_id=END,
    )  # fmt: skip
    old = bert_fast.BertModel.from_pretrained(tmp_path)
    for a, b in zip(model.encoder.parameters(), old.parameters(), strict=True):
        assert torch.equal(a, b)
    assert model.decoder.bert.embeddings.word.weight.std() < 0.03
    model.save_pretrained(tmp_path / "both")
    again = EncoderDecoderModel.from_pretrained(tmp_path / "both")
    inputs = batch()
    model.eval()
    assert torch.equal(
        *(m(**inputs, labels=labels((2,) * 4).fill_(5)).loss for m in (model, again))
    )


def test_bad_input_is_said(pair, tmp_path):
    _, ours = pair
    inputs = batch()
    for arguments, message in (
        ({}, "decoder_input_ids or labels must be given"),
        ({"labels": labels()[:2]}, r"labels must be \(4, seqlen\), not \(2, 7\)"),
        ({"labels": torch.full((4, 2), WORDS)}, "labels holds 53; the model has 0 to 52"),
        ({"decoder_input_ids": torch.ones(4, 25).long()}, "25 tokens; the decoder has 24 pos"),
        ({"decoder_input_ids": torch.ones(4, 3).long(), "labels": labels()},
         r"labels must have decoder_input_ids' shape \(4, 3\), not \(4, 7\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ours(**inputs, **arguments)
    with pytest.raises(ValueError, match="num_beams must be a positive integer, not 0"):
        ours.generate(**inputs, num_beams=0)
    with pytest.raises(ValueError, match="max_new_tokens wants 25 tokens"):
        ours.generate(**inputs, max_new_tokens=25)
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        ours.train().generate(**inputs)
    config = BertConfig(**SIZES)
    with pytest.raises(ValueError, match="the encoder's hidden_size is 36, the decoder's 72"):
        EncoderDecoderConfig(config, BertConfig(**SIZES | {"hidden_size": 72}))
    with pytest.raises(ValueError, match="eos_token_id must be one of the decoder's 61 tokens"):
        EncoderDecoderConfig(config, config, 1, 61)
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="is not an encoder-decoder's"):
        EncoderDecoderModel.from_pretrained(tmp_path / "bert")
