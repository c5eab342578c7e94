"""A text as token ids: in memory, or in files that are mapped into it and may be larger."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert_fast.files import atomic_path

CHUNK = 1 << 18  # characters that are tokenized at once
TYPES = {"ids": np.int32, "sentences": np.int64, "documents": np.int64}


class Tokens(NamedTuple):
    """Token ids of all documents, one after another.

    ids: int32 (tokens,). sentences: offsets into ids, one more than there are sentences.
    documents: offsets into sentences, one more than there are documents.
    """

    ids: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray


def tokenize(sentences, tokenizer):
    """The :class:`Tokens` of (number of the document, sentence) pairs."""
    pieces = zip(*_pieces(sentences, tokenizer), strict=True)
    return Tokens(*map(np.concatenate, pieces))


def write_tokens(directory, texts, tokenizer_file, sentences, tokenizer, reuse):
    """The files of :func:`read_tokens`, in one pass that keeps a chunk of the text in memory. With
    ``reuse`` what is there already stays.

    Raises:
        ValueError: with ``reuse``, naming what has changed since those files were written.
    """
    directory, about = Path(directory), Path(directory) / "about.json"
    inputs = {
        "tokenizer": digest(tokenizer_file),
        "texts": [[str(path), digest(path)] for path in texts],
    }
    if reuse and about.is_file():
        _unchanged(directory, json.loads(about.read_text(encoding="utf-8")), inputs)
        return
    directory.mkdir(exist_ok=True)
    about.unlink(missing_ok=True)  # it says that the others are whole
    lengths = dict.fromkeys(TYPES, 0)
    with (
        open(directory / "ids.bin", "wb") as ids,
        open(directory / "sentences.bin", "wb") as ends,
        open(directory / "documents.bin", "wb") as documents,
    ):
        for pieces in _pieces(sentences, tokenizer):
            for name, file, piece in zip(TYPES, (ids, ends, documents), pieces, strict=True):
                file.write(piece.tobytes())
                lengths[name] += len(piece)
    with atomic_path(about) as path:
        Path(path).write_text(json.dumps(inputs | {"lengths": lengths}), encoding="utf-8")


def read_tokens(directory):
    """(the :class:`Tokens` that were written, mapped into memory; the digests of what they were
    made of).

    Raises:
        ValueError: naming the file that has not the length it was written with.
    """
    directory = Path(directory)
    about = json.loads((directory / "about.json").read_text(encoding="utf-8"))
    arrays = []
    for name, dtype in TYPES.items():
        path, length = directory / f"{name}.bin", about["lengths"][name]
        if path.stat().st_size != length * np.dtype(dtype).itemsize:
            raise ValueError(f"{path} is not as it was written; without {directory}, --resume "
                             "makes it anew")  # fmt: skip
        mapped = np.memmap(path, dtype, "r") if length else np.empty(0, dtype)
        arrays.append(np.asarray(mapped))  # plain arrays are faster, and mapped all the same
    return Tokens(*arrays), [about["tokenizer"], *(digest for _, digest in about["texts"])]


def _pieces(sentences, tokenizer):
    """Of each of the three arrays the next piece, chunk after chunk of the text."""
    tokens = count = 0
    before = -1  # the document of the last sentence
    yield np.empty(0, np.int32), np.zeros(1, np.int64), np.empty(0, np.int64)
    for numbers, texts in _chunks(sentences):
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        ends = tokens + np.cumsum([len(encoding.ids) for encoding in encodings])
        ids = np.fromiter((i for e in encodings for i in e.ids), np.int32, ends[-1] - tokens)
        begins = count + np.flatnonzero(np.diff(numbers, prepend=before))
        yield ids, ends.astype(np.int64), begins.astype(np.int64)
        tokens, count, before = int(ends[-1]), count + len(texts), numbers[-1]
    yield np.empty(0, np.int32), np.empty(0, np.int64), np.array([count], np.int64)


def _chunks(sentences):
    numbers, texts, size = [], [], 0
    for number, text in sentences:
        numbers.append(number)
        texts.append(text)
        size += len(text)
        if size >= CHUNK:
            yield numbers, texts
            numbers, texts, size = [], [], 0
    if texts:
        yield numbers, texts


def digest(path):
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _unchanged(directory, before, now):
    if before["tokenizer"] != now["tokenizer"]:
        raise ValueError(f"--resume: the tokenizer has changed since {directory} was written")
    old, new = (dict(enumerate(inputs["texts"])) for inputs in (before, now))
    for i in sorted(old | new):
        if i not in new:
            raise ValueError(f"--resume: {old[i][0]} was a text of this run, and is none now")
        if i not in old or old[i][1] != new[i][1]:
            raise ValueError(f"--resume: {new[i][0]} is not what {directory} was made of")
