"""Text to embeddings with the real checkpoint, against Hugging Face."""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import bert_fast
from bert_fast import _C
from bert_fast.bench import data
from bert_fast.embeddings.pooling import pool
from bert_fast.embeddings.tokenizer import batches_by_tokens
from bert_fast.text import read_texts


@pytest.fixture(scope="module")
def encoder():
    return bert_fast.SentenceEncoder(data.minilm())


def texts():
    films = data.films()[:8]
    return [text for film in films for text in (film.plot * 2, *film.reviews[:3])]


def test_embeddings_are_hugging_faces(encoder):
    """sentence-transformers' recipe for this checkpoint: 256 tokens, mean, normalised."""
    directory = data.minilm()
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(texts(), padding=True, truncation=True, max_length=256, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state
    mean = (hidden * mask).sum(1) / mask.sum(1)
    wanted = torch.nn.functional.normalize(mean, dim=1).numpy()
    with pytest.warns(UserWarning, match="texts were cut to 256 tokens"):
        found = encoder.encode(texts(), batch_tokens=500, progress=True)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < 2e-6


def test_order_and_budget_do_not_matter(encoder):
    short = [text[:200] for text in texts()]
    a = encoder.encode(short, batch_tokens=10_000)
    b = encoder.encode(short[::-1], batch_tokens=1)[::-1]
    # On AMX few rows in float32 are rounded otherwise.
    assert np.abs(a - b).max() < 2e-6 if _C.linear_kind(0) == "amx" else np.array_equal(a, b)
    assert encoder.encode([]).shape == (0, 384)
    assert encoder.encode([""]).shape == (1, 384)


def test_bad_texts(encoder):
    with pytest.raises(TypeError, match=r"sentences\[1\] must be a string"):
        encoder.encode(["one", None])
    for name in ("batch_tokens", "batch_size", "truncate_dim"):
        with pytest.raises(ValueError, match=name):
            encoder.encode(["one"], **{name: 0})
    for name in ("precision", "output_value"):
        with pytest.raises(ValueError, match=name):
            encoder.encode(["one"], **{name: "int4"})


@given(lengths=st.lists(st.integers(0, 50), max_size=40), budget=st.integers(1, 100))
@settings(deadline=None)
def test_batches_hold_every_text_once_within_budget(lengths, budget):
    batches = list(batches_by_tokens(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or sum(lengths[i] for i in b) <= budget for b in batches)


@pytest.mark.parametrize("how", ["mean", "max", "cls"])
def test_pooling(how):
    hidden, cu = torch.randn(9, 4), torch.tensor([0, 4, 4, 9]).int()
    pooled = pool(hidden, cu, how)
    for i, part in enumerate((hidden[:4], None, hidden[4:])):
        if part is None:
            assert pooled[i].eq(0).all()
            continue
        wanted = {"mean": part.mean(0), "max": part.amax(0), "cls": part[0]}[how]
        torch.testing.assert_close(pooled[i], wanted)


def test_vocabulary_file_is_enough(tmp_path, encoder):
    for name in ("config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(data.minilm() / name)
    plain = bert_fast.SentenceEncoder(tmp_path)
    assert plain.pooling.modes == ("mean",)
    assert not plain.modules
    text = ["Élan: it's a naïve, under-rated film!"]
    assert [i.tolist() for i in plain.tokenize(text)] == [
        i.tolist() for i in encoder.tokenize(text)
    ]
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(bert_fast.CheckpointError, match=r"neither tokenizer\.json nor vocab\.txt"):
        bert_fast.SentenceEncoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(bert_fast.CheckpointError, match="tokenizer cannot be read"):
        bert_fast.SentenceEncoder(tmp_path)


def test_read_texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one\n\n zwölf \n", encoding="utf-8")
    assert read_texts(path, keep_blank=True) == ["one", "", " zwölf "]
    path.write_text(" \n\n")
    with pytest.raises(ValueError, match="holds no text"):
        read_texts(path)
    path.write_bytes(b"fine\n\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8: byte 5"):
        read_texts(path)
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two", "id": 3}\n')
    assert read_texts(path) == ["one", "two"]
    for bad in ('{"txt": "x"}', "{", "[1]", '{"text": 3}'):
        path.write_text('{"text": "one"}\n' + bad)
        with pytest.raises(ValueError, match=r"texts\.jsonl:2"):
            read_texts(path)


def test_a_part_in_training_is_no_more(encoder):
    """Whatever was put into training, and by whom: encode drops nothing out."""
    wanted = encoder.encode("one text")
    parts = encoder.model, encoder.model.layers[1].attention, encoder.model.embeddings.dropout
    for part in parts:
        part.training = True
        assert (encoder.encode("one text") == wanted).all()
        assert not any(module.training for module in encoder.model.modules())
