"""Text in, sentence embeddings out: the checkpoint's own tokenizer and pooling around BertModel."""

import contextlib
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bert_fast.embeddings.pooling import pool, read_pooling
from bert_fast.embeddings.settings import read_json
from bert_fast.embeddings.tokenizer import batches_by_tokens, load_tokenizer
from bert_fast.models.bert import BertModel


class SentenceEncoder:
    """Embeds texts with a BERT checkpoint, as sentence-transformers would.

    Args:
        directory: a checkpoint with config.json, weights, and tokenizer.json or vocab.txt. Where
            sentence-transformers' own files lie beside them (modules.json, 1_Pooling/config.json,
            sentence_bert_config.json), they decide pooling, normalisation and the longest text;
            else mean pooling, no normalisation, and the model's positions.
        dtype: of the weights; default the checkpoint's.
        device: where the model runs: "cpu" (default), "cuda", or a torch.device.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """

    def __init__(
        self, directory: str | Path, dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        directory = Path(directory)
        model = BertModel.from_pretrained(directory, dtype)
        # prepack lays weights out for the CPU: on a GPU it would only take memory.
        on_cpu = torch.device(device).type == "cpu"
        self.model = model.prepack() if on_cpu else model.to(device)
        positions = self.model.config.max_position_embeddings
        settings = read_json(directory / "sentence_bert_config.json")
        self.max_seqlen = min(settings.get("max_seq_length") or positions, positions)
        self.pooling = read_pooling(directory)
        modules = read_json(directory / "modules.json", default=[])
        self.normalize = any(str(m.get("type", "")).endswith("Normalize") for m in modules)
        self.tokenizer = load_tokenizer(directory)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.max_seqlen)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    def tokenize(self, texts: Iterable[str]) -> list[np.ndarray]:
        """A list of int64 arrays of ids; warns of texts that were cut to ``max_seqlen`` tokens."""
        encodings = self.tokenizer.encode_batch(list(texts))
        if truncated := sum(bool(encoding.overflowing) for encoding in encodings):
            warnings.warn(
                f"{truncated} of {len(encodings)} texts were cut to {self.max_seqlen} tokens",
                stacklevel=3,
            )
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def encode(
        self, texts: Iterable[str], *, batch_tokens: int = 4096, progress: bool | None = None
    ) -> np.ndarray:
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
        device = self.device
        hidden, _, _ = self.model(
            tokens.to(device), cu_seqlens=cu_seqlens.to(device), max_seqlen=int(lengths.max())
        )
        return self.pool(hidden, cu_seqlens.to(device)).cpu().numpy()


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
