"""``encode``'s arguments, each with sentence-transformers' own numbers; the cross-encoder."""

import json

import numpy as np
import pytest
import torch
from checkpoints import TEXTS, cross_encoder, sentence_transformer
from conftest import torch_threads
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import Pooling

import bert_fast
from bert_fast.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:.*texts were cut to:UserWarning")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(sentence-transformers' model, ours), of one directory."""
    modules = Pooling(32, ("mean", "cls")), Dense(64, 24), Normalize()
    theirs, directory = sentence_transformer(tmp_path_factory.mktemp("encode"), *modules)
    return theirs, bert_fast.SentenceEncoder(directory)


OPTIONS = [
    {},
    {"batch_size": 2},
    {"prompt": "the film "},
    {"normalize_embeddings": True},
    {"truncate_dim": 7},
    {"truncate_dim": 7, "normalize_embeddings": True},  # Matryoshka: cut, then normalised
    {"truncate_dim": 100},
    {"show_progress_bar": True},
    {"device": "cpu"},
    {"convert_to_tensor": True},
    {"convert_to_numpy": False},
    {"convert_to_numpy": False, "convert_to_tensor": True},
]


def check(found, wanted, atol=1e-5):
    assert type(found) is type(wanted)
    if isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            check(one, other)
        return
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    found, wanted = np.asarray(found), np.asarray(wanted)
    scale = max(1.0, np.abs(wanted).max()) if wanted.size else 1.0
    np.testing.assert_allclose(found, wanted, rtol=0, atol=atol * scale)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[1], TEXTS[:1]], ids=["many", "string", "one"])
def test_options(pair, options, texts):
    theirs, ours = pair
    check(ours.encode(texts, **options), theirs.encode(texts, **options))


def test_tokens(pair):
    theirs, ours = pair
    for texts in (TEXTS, TEXTS[1]):
        check(*(m.encode(texts, output_value="token_embeddings") for m in (ours, theirs)))


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_precision(pair, precision):
    """Of the same floats the same integers; of each one's own floats nearly the same, for a float
    that lies between two integers may fall either way."""
    from sentence_transformers.util.quantization import quantize_embeddings

    from bert_fast.embeddings.vectors import quantize

    theirs, ours = pair
    floats = np.random.randn(50, 24).astype("f4")
    wanted = quantize_embeddings(floats, precision)
    found = quantize(floats, precision)
    assert found.dtype == wanted.dtype
    assert np.array_equal(found, wanted)
    found, wanted = (
        ours.encode(TEXTS, precision=precision),
        theirs.encode(TEXTS, precision=precision),
    )
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    if precision.endswith("int8"):
        assert np.abs(found.astype(int) - wanted).max() <= 1
        with pytest.raises(ValueError, match="more than one text"):
            ours.encode("one", precision=precision)
    else:
        assert (found != wanted).sum() <= 2


def test_small_batches_are_pooled_in_one_thread(pair, monkeypatch):
    """As the layers before them leave OpenMP's threads: ended."""
    _, ours = pair
    wanted, seen, pool = ours.encode(TEXTS), [], ours.pool

    def counted(*args):
        seen.append(torch.get_num_threads())
        return pool(*args)

    monkeypatch.setattr(ours, "pool", counted)
    with torch_threads(2):
        assert np.array_equal(ours.encode(TEXTS), wanted)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2


def test_no_texts(pair):
    assert pair[1].encode([]).shape == (0, 24)
    assert pair[1].encode([], convert_to_tensor=True).shape == (0, 24)
    assert pair[1].encode([], output_value="token_embeddings") == []


def test_a_prompt_beside_its_name(pair):
    with pytest.warns(UserWarning, match="prompt_name is not used"):
        found = pair[1].encode(TEXTS, prompt="a ", prompt_name="query")
    assert np.array_equal(found, pair[1].encode(TEXTS, prompt="a "))


def test_an_iterable_is_taken(pair):
    wanted = pair[1].encode(TEXTS)
    assert np.array_equal(pair[1].encode(iter(TEXTS)), wanted)
    assert np.array_equal(pair[1].encode(np.array(TEXTS)), wanted)


def test_max_seq_length_can_be_set(pair):
    theirs, ours = pair
    before = ours.max_seq_length
    try:
        ours.max_seq_length = theirs.max_seq_length = 5
        check(ours.encode(TEXTS), theirs.encode(TEXTS))
        with pytest.raises(ValueError, match="max_seq_length must be 1 to 40"):
            ours.max_seq_length = 41
    finally:
        ours.max_seq_length = theirs.max_seq_length = before


def test_processes(pair):
    """Spawned, each with its copy; results in the texts' order; a failure is said."""
    ours = pair[1]
    wanted = ours.encode(TEXTS)
    pool = ours.start_multi_process_pool(["cpu", "cpu"])
    try:
        found = ours.encode(TEXTS, pool=pool, chunk_size=2)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
        assert ours.encode([], pool=pool).shape == (0, 24)
        tokens = ours.encode(TEXTS, pool=pool, output_value="token_embeddings")
        check(tokens, ours.encode(TEXTS, output_value="token_embeddings"))
    finally:
        ours.stop_multi_process_pool(pool)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_cross_encoder(tmp_path, num_labels):
    theirs, directory = cross_encoder(tmp_path, num_labels)
    ours = bert_fast.CrossEncoder(directory)
    pairs = [(a, b) for a in TEXTS[:4] for b in TEXTS[3:]]
    for options in (
        {}, {"batch_size": 3}, {"activation_fn": torch.nn.Tanh()}, {"prompt": "plot "},
        {"convert_to_tensor": True}, {"convert_to_numpy": False}, {"apply_softmax": True},
    ):  # fmt: skip
        check(ours.predict(pairs, **options), theirs.predict(pairs, **options))
    check(ours.predict(list(pairs[0])), theirs.predict(list(pairs[0])))
    if num_labels > 1:
        with pytest.raises(ValueError, match="this one has 3: use predict"):
            ours.rank("a", ["b"])
        return
    for options in ({}, {"top_k": 2}, {"return_documents": True}):
        found, wanted = (m.rank(TEXTS[0], TEXTS[1:], **options) for m in (ours, theirs))
        assert [r["corpus_id"] for r in found] == [r["corpus_id"] for r in wanted]
        assert [r.get("text") for r in found] == [r.get("text") for r in wanted]
        np.testing.assert_allclose(
            [r["score"] for r in found], [r["score"] for r in wanted], rtol=0, atol=5e-6
        )
    with pytest.raises(TypeError, match=r"sentences\[1\] must be a pair"):
        ours.predict([("a", "b"), ("a", "b", "c")])
    with pytest.raises(TypeError, match="not one string"):
        ours.predict("ab")
    ours.max_length = theirs.max_length = 6
    check(ours.predict(pairs), theirs.predict(pairs))


@pytest.mark.parametrize("activation", [torch.nn.Identity(), torch.nn.Tanh(), None])
def test_the_activation_that_the_files_say(tmp_path, activation):
    theirs, directory = cross_encoder(tmp_path, activation_fn=activation)
    pairs = [(a, TEXTS[0]) for a in TEXTS]
    check(bert_fast.CrossEncoder(directory).predict(pairs), theirs.predict(pairs))


def test_a_classifier_of_transformers_alone(tmp_path):
    cross_encoder(tmp_path)
    theirs = CrossEncoder(str(tmp_path / "base"), device="cpu")
    pairs = [(a, TEXTS[0]) for a in TEXTS]
    check(bert_fast.CrossEncoder(tmp_path / "base").predict(pairs), theirs.predict(pairs))


def test_one_is_not_the_other(tmp_path):
    _, directory = cross_encoder(tmp_path)
    with pytest.raises(bert_fast.CheckpointError, match="holds a CrossEncoder, not a Sentence"):
        bert_fast.SentenceEncoder(directory)
    _, directory = sentence_transformer(tmp_path / "b", Pooling(32))
    with pytest.raises(bert_fast.CheckpointError, match="holds a SentenceTransformer, not a Cross"):
        bert_fast.CrossEncoder(directory)


def test_their_class_and_ours_read_one_directory(tmp_path):
    """A model saved before modules lay in packages of their own."""
    theirs, directory = sentence_transformer(tmp_path, Pooling(32), Dense(32, 6))
    path = directory / "modules.json"
    listed = json.loads(path.read_text())
    for module in listed:
        module["type"] = "sentence_transformers.models." + module["type"].rpartition(".")[2]
    path.write_text(json.dumps(listed))
    again = SentenceTransformer(str(directory), device="cpu")
    check(bert_fast.SentenceEncoder(directory).encode(TEXTS), again.encode(TEXTS))
    check(again.encode(TEXTS), theirs.encode(TEXTS))


def test_rerank_on_the_command_line(tmp_path, capsys):
    """Ranked as sentence-transformers ranks them; a blank line is a text of its own."""
    theirs, directory = cross_encoder(tmp_path)
    path, out = tmp_path / "texts.txt", tmp_path / "ranked.jsonl"
    path.write_bytes("\ufeffthe film\r\n\r\nthe bad\u2028plot\x0c!\rgood".encode())
    texts = ["the film", "", "the bad\u2028plot\x0c!", "good"]
    wanted = theirs.rank("good plot?", texts, return_documents=True)
    words = ["rerank", "--model", str(directory), "--text", str(path), "--query", "good plot?"]
    assert main(words) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert [row["corpus_id"] for row in found] == [row["corpus_id"] for row in wanted]
    assert [row["text"] for row in found] == [row["text"] for row in wanted]
    assert main([*words, "--top-k", "2", "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8").count("\n") == 2
    assert main([*words, "--out", str(out)]) == 1
    assert "--overwrite replaces it" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*newly initialised.*:UserWarning")
def test_a_bare_encoder_becomes_a_scorer(tmp_path):
    from checkpoints import bert

    ours = bert_fast.CrossEncoder(bert(tmp_path / "base"))
    assert ours.num_labels == CrossEncoder(str(tmp_path / "base"), device="cpu").num_labels == 1
    with pytest.raises(ValueError, match="precision is of sentence embeddings"):
        bert_fast.SentenceEncoder(tmp_path / "base").encode(
            TEXTS, output_value="token_embeddings", precision="int8"
        )


def test_on_its_device(tmp_path, device):
    theirs, directory = sentence_transformer(tmp_path, Pooling(32))
    wanted = theirs.encode(TEXTS)
    ours = bert_fast.SentenceEncoder(directory, device=device)
    accelerated = bert_fast.accelerate(theirs.to(device))
    for model in (ours, accelerated):
        np.testing.assert_allclose(model.encode(TEXTS), wanted, rtol=0, atol=2e-5)
    theirs, directory = cross_encoder(tmp_path / "cross")
    pairs = [("the film", text) for text in TEXTS]
    ours = bert_fast.CrossEncoder(directory, device=device)
    np.testing.assert_allclose(ours.predict(pairs), theirs.predict(pairs), rtol=0, atol=2e-5)
