"""The checkpoint's tokenizer, and batches of similar length."""

from pathlib import Path

from bert_fast.embeddings.settings import read_json
from bert_fast.models.checkpoint import CheckpointError
from bert_fast.text import read_texts as read_texts


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
