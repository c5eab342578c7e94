"""Text in, sentence embeddings out: the checkpoint's own tokenizer and pooling around BertModel."""

import contextlib
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bert_fast.models.bert import BertModel
from bert_fast.models.checkpoint import CheckpointError
from bert_fast.ops import reference

# sentence-transformers' names for how token vectors become one vector.
POOLING = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


class SentenceEncoder:
    """Embeds texts with a BERT checkpoint, as sentence-transformers would.

    Args:
        directory: a checkpoint with config.json, weights, and tokenizer.json or vocab.txt. Where
            sentence-transformers' own files lie beside them (modules.json, 1_Pooling/config.json,
            sentence_bert_config.json), they decide pooling, normalisation and the longest text;
            else mean pooling, no normalisation, and the model's positions.
        dtype: of the weights; default the checkpoint's.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """

    def __init__(self, directory, dtype=None):
        directory = Path(directory)
        self.model = BertModel.from_pretrained(directory, dtype).prepack()
        positions = self.model.config.max_position_embeddings
        settings = _read_json(directory / "sentence_bert_config.json")
        self.max_seqlen = min(settings.get("max_seq_length") or positions, positions)
        self.pooling = _pooling(directory)
        modules = _read_json(directory / "modules.json", default=[])
        self.normalize = any(str(m.get("type", "")).endswith("Normalize") for m in modules)
        self.tokenizer = load_tokenizer(directory)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.max_seqlen)

    def tokenize(self, texts):
        """A list of int64 arrays of ids; warns of texts that were cut to ``max_seqlen`` tokens."""
        encodings = self.tokenizer.encode_batch(list(texts))
        if truncated := sum(bool(encoding.overflowing) for encoding in encodings):
            warnings.warn(
                f"{truncated} of {len(encodings)} texts were cut to {self.max_seqlen} tokens",
                stacklevel=3,
            )
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def encode(self, texts, *, batch_tokens=4096, progress=None):
        """Embeddings of a list of texts, as one fp32 array (len(texts), hidden).

        Texts are sorted by length into batches of at most ``batch_tokens`` real tokens (a longer
        text is a batch of its own), packed without padding, and put back in order. ``progress``
        shows a bar: default, on a terminal, for more than 1,000 texts. A text with more tokens
        than ``max_seqlen`` is cut, with a warning.

        Raises:
            TypeError: texts is a single string, or holds something else than strings.
            ValueError: batch_tokens is below 1.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, not one string")
        texts = list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}] must be a string, not {type(text).__name__}")
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, not {batch_tokens}")
        ids = self.tokenize(texts)
        with _progress(len(texts), progress) as advance:
            return self.encode_ids(ids, batch_tokens, advance)

    def encode_ids(self, ids, batch_tokens=4096, advance=lambda count: None):
        """:meth:`encode` of texts that :meth:`tokenize` has tokenized; ``advance`` is told how many
        are done."""
        out = np.empty((len(ids), self.model.config.hidden_size), dtype=np.float32)
        for batch in batches_by_tokens([len(i) for i in ids], batch_tokens):
            out[batch] = self._embed([ids[i] for i in batch])
            advance(len(batch))
        return out

    def pool(self, hidden, cu_seqlens):
        """Packed token vectors to sentence embeddings, as the checkpoint's own files say."""
        pooled = pool(hidden.float(), cu_seqlens, self.pooling)
        return F.normalize(pooled, dim=1) if self.normalize else pooled

    @torch.inference_mode()
    def _embed(self, sequences):
        lengths = np.array([len(s) for s in sequences])
        cu_seqlens = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
        tokens = torch.from_numpy(np.concatenate(sequences))
        device = next(self.model.parameters()).device
        hidden, _, _ = self.model(
            tokens.to(device), cu_seqlens=cu_seqlens.to(device), max_seqlen=int(lengths.max())
        )
        return self.pool(hidden, cu_seqlens.to(device)).cpu().numpy()


def pool(hidden, cu_seqlens, how):
    """(total_tokens, hidden) -> (batch, hidden): each sequence's mean, max or first token; zeros
    for an empty sequence."""
    batch, width = cu_seqlens.numel() - 1, hidden.shape[1]
    lengths = cu_seqlens.diff()[:, None]
    sequence, _ = reference.sequence_of_token(cu_seqlens, hidden.shape[0])
    if how == "mean":
        total = hidden.new_zeros(batch, width).index_add_(0, sequence, hidden)
        return total / lengths.clamp(min=1)
    if how == "max":
        index = sequence[:, None].expand_as(hidden)
        top = hidden.new_full((batch, width), -torch.inf).scatter_reduce_(0, index, hidden, "amax")
        return top.masked_fill(lengths == 0, 0)
    first = cu_seqlens[:-1].long().clamp(max=max(hidden.shape[0] - 1, 0))
    return (
        hidden[first].masked_fill(lengths == 0, 0)
        if len(hidden)
        else hidden.new_zeros(batch, width)
    )


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
            settings = _read_json(directory / "tokenizer_config.json")
            return BertWordPieceTokenizer(
                str(vocabulary), lowercase=settings.get("do_lower_case", True)
            )
    except CheckpointError:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"{directory}: the tokenizer cannot be read: {error}") from error
    raise CheckpointError(f"{directory} has neither tokenizer.json nor vocab.txt")


def read_texts(path):
    """The texts of a file: a line each, or of a .jsonl file each line's "text".

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


def _pooling(directory):
    settings = _read_json(directory / "1_Pooling" / "config.json")
    chosen = [
        mode for mode, value in settings.items() if mode.startswith("pooling_mode_") and value
    ]
    if not settings:
        return "mean"
    if len(chosen) != 1 or chosen[0] not in POOLING:
        raise CheckpointError(
            f"{directory}/1_Pooling/config.json: {chosen} is not one of {list(POOLING)}"
        )
    return POOLING[chosen[0]]


def _read_json(path, default=None):
    if not path.is_file():
        return {} if default is None else default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not a JSON file: {error}") from error


@contextlib.contextmanager
def _progress(total, wanted):
    """Gives ``advance(count)`` for a bar on stderr; one that does nothing where none is wanted."""
    if wanted is None:
        wanted = total > 1000 and sys.stderr.isatty()
    if not wanted:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = [*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("embedding", total=total)
        yield lambda count: bar.advance(task, count)
