"""Token ids in files: the same as in memory, made in little memory, read in parts, reused."""

import dataclasses
import json
import random
import shutil
import tracemalloc

import numpy as np
import pytest
import torch

from bert_fast.training import corpus, tokens
from bert_fast.training.pretrain import Settings, _Run, pretrain
from bert_fast.training.processes import Group

TEXT = "the cat sees a dog by old river one red house has green door 北京 café \u200b"
WORDS = TEXT.split(" ")


def drawn(rng, documents=30):
    """Documents of sentences of drawn words; some sentences hold nothing for a tokenizer."""
    return [
        [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 9))]
        for _ in range(documents)
    ]


def write(path, documents):
    path.write_text("\n\n".join("\n".join(some) for some in documents) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def texts(tmp_path):
    rng = random.Random(torch.randint(2**31, ()).item())
    return [write(tmp_path / name, drawn(rng)) for name in ("a.txt", "b.txt")]


@pytest.fixture
def tokenizer(texts):
    return corpus.train_tokenizer(corpus.read_documents(texts), 60)


def store(directory, texts, tokenizer):
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    corpus.prepare(directory, texts, True, 1, None, 0)
    return tokens.read_tokens(directory / "tokens")[0]


def test_files_are_memory_exactly(texts, tokenizer, tmp_path, monkeypatch):
    """Whatever the chunks; and both are what the tokenizer makes of sentence after sentence."""
    documents = corpus.read_documents(texts)
    in_memory = corpus.Corpus(documents, tokenizer)
    expected = [[tokenizer.encode(s, add_special_tokens=False).ids for s in d] for d in documents]
    offsets = in_memory.sentences, in_memory.documents
    found = [
        [in_memory.ids[slice(*offsets[0][i : i + 2])].tolist() for i in range(a, b)]
        for a, b in zip(offsets[1][:-1], offsets[1][1:], strict=True)
    ]
    assert found == expected
    for chunk in (1, random.randint(20, 300), 1 << 18):
        monkeypatch.setattr(tokens, "CHUNK", chunk)
        stored = store(tmp_path / f"of {chunk}", texts, tokenizer)
        for name, array in stored._asdict().items():
            assert array.dtype == tokens.TYPES[name]
            assert isinstance(array.base, np.memmap)
            assert np.array_equal(array, getattr(in_memory, name))
        for kind in (corpus.PairSampler, corpus.SequenceSampler):
            ours, theirs = (
                kind(c, np.arange(50), 24, 200, seed=chunk)
                for c in (corpus.Corpus(stored, tokenizer), in_memory)
            )
            (rows, slices), (same, _) = ours.epoch(1), theirs.epoch(1)
            assert np.array_equal(rows, same)
            batches = (vars(s.batch(rows, slices[0], 1)) for s in (ours, theirs))
            for a, b in zip(*(batch.values() for batch in batches), strict=True):
                assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_tokenizing_keeps_one_chunk(tokenizer, tmp_path, monkeypatch):
    """Four times the text takes no more memory; no sentence is read before its chunk's turn."""
    monkeypatch.setattr(tokens, "CHUNK", 2000)
    rng, peaks, read, done = random.Random(3), [], [0], [0]
    for times in (1, 4):
        path = write(tmp_path / f"{times}.txt", drawn(rng, 300) * times)
        tracemalloc.start()
        store(tmp_path / f"of {times}", [path], tokenizer)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]

    def reading():
        for read[0], sentence in enumerate(corpus.iter_sentences([path]), 1):
            yield sentence

    class Watched:
        def encode_batch(self, some, **options):
            assert sum(map(len, some[:-1])) < 2000
            done[0] += len(some)
            assert done == read
            return tokenizer.encode_batch(some, **options)

    tokens.tokenize(reading(), Watched())
    assert done == read
    assert done[0] > 1000


class Recording:
    """An array that knows what was read of it."""

    def __init__(self, array):
        self.array, self.read = array, []

    def __getitem__(self, some):
        self.read.extend(range(*some.indices(len(self.array))))
        return self.array[some]


@pytest.mark.parametrize("alone", [False, True])
def test_each_process_reads_its_own_part(texts, tokenizer, tmp_path, alone):
    """Of a step, and of the counts behind the unigram entropy."""
    whole = corpus.Corpus(store(tmp_path / "run", texts, tokenizer), tokenizer)
    whole.ids = Recording(whole.ids)
    kind = corpus.SequenceSampler if alone else corpus.PairSampler
    sampler = kind(whole, np.arange(40), 24, 300)
    rows, slices = sampler.epoch(0)
    run, reads, labels = _Run.__new__(_Run), [], []
    for rank in range(3):
        run.group = Group(rank, 3, torch.device("cpu"))
        whole.ids.read.clear()
        parts = run._own(sampler, rows, slices[0], 0, 2)
        assert len(parts) == 2
        labels += [batch.labels for batch, count in parts if count]
        reads.append(list(whole.ids.read))
    assert torch.equal(torch.cat(labels), sampler.batch(rows, slices[0], 0).labels)
    expected = [i for row in rows[slices[0]].tolist() for a, b in zip(row[:4:2], row[1:4:2],
                strict=True) for i in range(a, b)]  # fmt: skip
    assert sum(reads, []) == expected  # noqa: RUF017
    assert all(reads)
    whole.ids.read.clear()
    counts = sum(whole.counts(np.arange(7, 33), part, 3) for part in range(3))
    first, last = whole.sentences[whole.documents[[7, 33]]]
    assert whole.ids.read == list(range(first, last))
    assert np.array_equal(counts, np.bincount(whole.ids.array[first:last], minlength=len(counts)))
    entropy = torch.distributions.Categorical(torch.from_numpy(counts / counts.sum())).entropy()
    assert corpus.unigram_entropy(counts) == pytest.approx(float(entropy), rel=1e-6)


def test_reused_or_refused(texts, tmp_path):
    """On resume, what is unchanged is not written again; what has changed is named."""
    out = tmp_path / "run"
    settings = Settings(
        text=texts, out=str(out), layers=1, hidden=32, heads=2, max_length=16, vocab_size=60,
        steps=2, batch_tokens=100, device="cpu",
    )  # fmt: skip
    pretrain(settings)
    again = dataclasses.replace(settings, resume=True)
    kept, before = out / "tokens" / "ids.bin", (out / "tokens" / "ids.bin").stat().st_mtime_ns
    pretrain(again)
    moved = shutil.copy(texts[1], tmp_path / "moved.txt")
    pretrain(dataclasses.replace(again, text=[texts[0], moved]))
    assert kept.stat().st_mtime_ns == before

    def refused(message, text=texts):
        with pytest.raises(ValueError, match=message):
            pretrain(dataclasses.replace(again, text=text))

    refused(r"b\.txt was a text of this run, and is none now", texts[:1])
    refused(r"moved\.txt is not what .*tokens was made of", [*texts, moved])
    refused(r"b\.txt is not what .*tokens was made of", texts[::-1])
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-4])
    refused(r"ids\.bin is not as it was written")
    shutil.rmtree(out / "tokens")
    pretrain(again)  # made anew
    assert kept.read_bytes() == whole
    tokenizer = (out / "tokenizer.json").read_bytes()
    changed = json.loads(tokenizer)
    changed["normalizer"]["lowercase"] = False
    (out / "tokenizer.json").write_text(json.dumps(changed))
    refused("the tokenizer has changed since")
    (out / "tokenizer.json").write_bytes(tokenizer)
    pretrain(again)
    shutil.rmtree(out / "tokens")
    refused(r"run was trained on another text, or tokenizer", texts[::-1])
