"""Small batches by CUDA graphs. What is decided is tested with a capture that calls the function
again, on the CPU; that it runs, on a GPU."""

import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor

import checkpoints
import numpy as np
import pytest
import torch
import transformers
from sentence_transformers.sentence_transformer.modules import Pooling

import bert_fast
from bert_fast.embeddings import graphed
from bert_fast.embeddings.graphed import GraphedBackbone
from bert_fast.models import graphs

TEXTS = checkpoints.TEXTS * 3
PAIRS = [("the film", text) for text in TEXTS]


def again(function):
    """In the place of a capture: a replay computes anew, into the same memory."""
    outputs = function()

    def replay():
        for kept, new in zip(outputs, function(), strict=True):
            kept.copy_(new)

    return replay, outputs


def with_graphs(model, capture=again):
    model._graphed = GraphedBackbone(model.backbone, capture)
    return model


def other_family(tmp_path):
    """A RoBERTa under :func:`accelerate`, which counts positions from its padding."""
    config = transformers.RobertaConfig(**checkpoints.SIZES | {"type_vocab_size": 1})
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    base = checkpoints.bert(tmp_path / "tokenizer")
    (tmp_path / "vocab.txt").write_bytes((base / "vocab.txt").read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    return tmp_path


def of_bert(tmp_path):
    return checkpoints.sentence_transformer(tmp_path, Pooling(32))[1]


@pytest.mark.filterwarnings("ignore:.* texts were cut")
@pytest.mark.parametrize("made", [of_bert, other_family])
def test_embeddings(tmp_path, made):
    directory = str(made(tmp_path))
    plain, ours = bert_fast.SentenceEncoder(directory), bert_fast.SentenceEncoder(directory)
    with_graphs(ours)
    wanted = plain.encode(TEXTS, batch_size=4)
    for captured in (False, True, True):
        found = ours.encode(TEXTS, batch_size=4)
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
        assert (ours._graphed.run.captured > 1) >= captured
    before = ours._graphed.run.captured
    ours.encode(TEXTS, batch_size=4)
    assert ours._graphed.run.captured == before  # all that there is to capture
    for a, b in zip(
        ours.encode(TEXTS[:5], output_value="token_embeddings"),
        plain.encode(TEXTS[:5], output_value="token_embeddings"), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.* texts were cut")
@pytest.mark.parametrize("labels", [1, 3])
def test_scores(tmp_path, labels):
    theirs, saved = checkpoints.cross_encoder(tmp_path, labels)
    ours = with_graphs(bert_fast.CrossEncoder(str(saved)))
    wanted = theirs.predict(PAIRS)
    for _ in range(3):
        found = ours.predict(PAIRS, batch_size=4)
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert ours._graphed.run.captured


def test_what_comes_once_is_not_captured(tmp_path):
    ours = with_graphs(bert_fast.SentenceEncoder(str(of_bert(tmp_path))))
    run = ours._graphed.run
    ours.encode("the film")
    assert (run.captured, len(run.uses)) == (0, 1)
    ours.encode("the good plot")
    ours.encode("the plot")  # the second of its bucket
    assert run.captured == 1


def test_large_batches_are_not_captured(tmp_path, monkeypatch):
    monkeypatch.setattr(graphed, "MOST_TOKENS", 20)
    ours = with_graphs(bert_fast.SentenceEncoder(str(of_bert(tmp_path))))
    for _ in range(3):
        ours.encode(["the film: good, bad, good"] * 4)
    assert not ours._graphed.run.uses
    for _ in range(2):
        ours.encode("the film")
    assert ours._graphed.run.captured == 1


def test_a_change_is_seen(tmp_path):
    """Weights written in place, put in another's place, moved to other memory, another backbone."""
    ours = with_graphs(bert_fast.SentenceEncoder(str(of_bert(tmp_path))))
    plain = copy.deepcopy(ours)
    assert plain._graphed is None

    def agree():
        found, wanted = (m.encode("the good film") for m in (ours, plain))
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
        return wanted

    first = [agree() for _ in range(3)][-1]
    with torch.no_grad():
        for m in (ours, plain):
            m.model.layers[1].feed_forward.up.weight.mul_(1.5)
    second = agree()
    for m in (ours, plain):
        up = m.model.layers[0].feed_forward.up
        up.weight = torch.nn.Parameter(up.weight.detach() * 1.5)
    third = agree()
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(second - third).max() > 1e-3
    for m in (ours, plain):
        m.model.to(torch.float64)
    agree()
    graphs_were = ours._graphed
    ours.to("cpu")
    assert ours._graphed is None
    ours._graphed = graphs_were
    ours.backbone = copy.deepcopy(plain.backbone)
    agree()
    assert ours._graphed is None  # of another backbone; and on a CPU there are none


def test_off_and_on_a_cpu(tmp_path):
    for on in (True, False):
        ours = bert_fast.SentenceEncoder(str(of_bert(tmp_path / str(on))), cuda_graphs=on)
        ours.encode("the film")
        assert ours._graphed is None
        assert ours.cuda_graphs is on


def test_what_cannot_be_captured_runs_without(tmp_path):
    def broken(function):
        raise RuntimeError("out of memory")

    ours = with_graphs(bert_fast.SentenceEncoder(str(of_bert(tmp_path))), broken)
    wanted = ours.encode("the film")
    with pytest.warns(UserWarning, match="without CUDA graphs from now on: .* out of memory"):
        found = ours.encode("the film")
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.encode("the film"), wanted, rtol=1e-4, atol=1e-5)


def test_threads_copies_and_pickles(tmp_path):
    ours = with_graphs(bert_fast.SentenceEncoder(str(of_bert(tmp_path))))
    plain = pickle.loads(pickle.dumps(ours))
    assert plain._graphed is None
    texts = [" ".join(["film"] * n) for n in range(1, 9)] * 6
    with ThreadPoolExecutor(4) as pool:
        found = np.stack(list(pool.map(ours.encode, texts)))
    np.testing.assert_allclose(found, plain.encode(texts), rtol=1e-4, atol=1e-5)
    assert ours._graphed.run.captured


def theirs_and_graphed(tmp_path, monkeypatch=None, device="cpu"):
    theirs, _ = checkpoints.sentence_transformer(tmp_path, Pooling(32))
    theirs.to(device)
    if monkeypatch is not None:
        monkeypatch.setattr(
            graphs, "CudaGraphs", functools.partial(graphs.CudaGraphs, capture=again)
        )
    return theirs, bert_fast.cudagraph(bert_fast.accelerate(copy.deepcopy(theirs)))


def run_of(graphed):
    return next(m for m in graphed.modules() if isinstance(m, graphs.Graphed)).run


def test_a_sentence_transformer(tmp_path, monkeypatch):
    theirs, graphed = theirs_and_graphed(tmp_path, monkeypatch)
    assert type(graphed) is type(theirs)
    for _ in range(2):
        found = graphed.encode(checkpoints.TEXTS, batch_size=3)
        np.testing.assert_allclose(found, theirs.encode(checkpoints.TEXTS), rtol=1e-4, atol=1e-5)
    assert run_of(graphed).captured == 3
    assert graphed.get_sentence_embedding_dimension() == 32
    assert graphed.tokenize(["the film"])["input_ids"].shape == (1, 4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_sentence_transformer(tmp_path, monkeypatch, copied):
    """As for several processes: a copy has its own model and graphs."""
    theirs, first = theirs_and_graphed(tmp_path, monkeypatch)
    monkeypatch.undo()  # pickle wants CudaGraphs by its name
    first.encode(checkpoints.TEXTS)
    captured, second = run_of(first).captured, copied(first)
    assert run_of(second).captured == 0
    with torch.no_grad():
        for model in (theirs, second):
            model[0].auto_model.encoder.layer[0].output.dense.weight.mul_(3)
    wanted = theirs.encode(checkpoints.TEXTS)
    np.testing.assert_allclose(second.encode(checkpoints.TEXTS), wanted, rtol=1e-4, atol=1e-5)
    assert run_of(second).captured == captured > 0
    assert np.abs(first.encode(checkpoints.TEXTS) - wanted).max() > 1e-3
    assert run_of(first).captured == captured


def test_a_head_learns_from_a_frozen_sentence_transformer(tmp_path, monkeypatch):
    theirs, graphed = theirs_and_graphed(tmp_path, monkeypatch)
    features = theirs.tokenize(checkpoints.TEXTS)
    head, grads, real = torch.nn.Linear(32, 2), [], features["attention_mask"].bool()
    for model in (theirs.eval(), graphed.eval()):
        with torch.no_grad():
            vectors = model(dict(features))["token_embeddings"]
        grads.append(torch.autograd.grad(head(vectors)[real].square().sum(), head.weight)[0])
    assert run_of(graphed).captured == 1
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_another_thread_may_drop_the_graphs(tmp_path):
    """At any time: after a capture that failed there."""
    ours = bert_fast.SentenceEncoder(str(of_bert(tmp_path)))
    wanted = ours.encode("the film")

    class Dropped(GraphedBackbone):
        reads = 0

        @property
        def run(self):
            self.reads += 1
            return self.kept if self.reads == 1 else None

        @run.setter
        def run(self, value):
            self.kept = value

    ours._graphed = Dropped(ours.backbone, again)
    for _ in range(2):
        np.testing.assert_allclose(ours.encode("the film"), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU; its logic ran without one"
)
@pytest.mark.filterwarnings("ignore:.* texts were cut")
class TestOnAGpu:
    @pytest.mark.parametrize("made", [of_bert, other_family])
    def test_embeddings(self, tmp_path, made):
        directory = str(made(tmp_path))
        wanted = bert_fast.SentenceEncoder(directory).encode(TEXTS)
        ours = bert_fast.SentenceEncoder(directory, device="cuda")
        for _ in range(3):
            found = ours.encode(TEXTS, batch_size=4)
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
        assert ours._graphed.run.captured

    def test_scores(self, tmp_path):
        theirs, saved = checkpoints.cross_encoder(tmp_path)
        ours = bert_fast.CrossEncoder(str(saved), device="cuda")
        for _ in range(3):
            found = ours.predict(PAIRS, batch_size=4)
            np.testing.assert_allclose(found, theirs.predict(PAIRS), rtol=1e-3, atol=1e-4)
        assert ours._graphed.run.captured

    def test_a_sentence_transformer(self, tmp_path):
        theirs, graphed = theirs_and_graphed(tmp_path, device="cuda")
        for _ in range(2):
            found = graphed.encode(checkpoints.TEXTS, batch_size=3)
            wanted = theirs.encode(checkpoints.TEXTS)
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
        assert run_of(graphed).captured == 3
