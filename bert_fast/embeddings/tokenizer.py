"""Texts from a file, the checkpoint's tokenizer, and batches of similar length."""

import json
from pathlib import Path

from bert_fast.embeddings.settings import read_json
from bert_fast.models.checkpoint import CheckpointError


def read_texts(path):
    """The texts of a file: one per line, or from a .jsonl file each line's "text".

    Raises:
        ValueError: naming the file, and the line, that is empty, not UTF-8 or not as expected.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start}: {error.reason}") from error
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path} holds no text")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    texts = []
    for number, line in numbered:
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path}:{number}: expected {{"text": "..."}}: {error!r}') from error
        if not isinstance(text, str):
            raise ValueError(f'{path}:{number}: "text" must be a string')
        texts.append(text)
    return texts


def load_tokenizer(directory):
    """The checkpoint's tokenizer: tokenizer.json, else BERT's WordPiece over vocab.txt."""
    from tokenizers import Tokenizer
    from tokenizers.implementations import BertWordPieceTokenizer

    directory = Path(directory)
    whole, vocabulary = directory / "tokenizer.json", directory / "vocab.txt"
    try:
        if whole.is_file():
            return Tokenizer.from_file(str(whole))
        if vocabulary.is_file():
            settings = read_json(directory / "tokenizer_config.json")
            return BertWordPieceTokenizer(
                str(vocabulary), lowercase=settings.get("do_lower_case", True)
            )
    except CheckpointError:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"{directory}: the tokenizer cannot be read: {error}") from error
    raise CheckpointError(f"{directory} has neither tokenizer.json nor vocab.txt")


def batches_by_tokens(lengths, budget):
    """Indices in batches of similar length, each of at most ``budget`` tokens or one sequence."""
    batch, used = [], 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if batch and used + lengths[i] > budget:
            yield batch
            batch, used = [], 0
        batch.append(i)
        used += lengths[i]
    if batch:
        yield batch
