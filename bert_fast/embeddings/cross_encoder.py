"""Pairs of texts in, scores out, as sentence-transformers' CrossEncoder gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bert_fast.embeddings.modules import by_row, read_activation
from bert_fast.embeddings.settings import read_json
from bert_fast.embeddings.text_model import TextModel, check_batches, converted
from bert_fast.files import CheckpointError


class CrossEncoder(TextModel):
    """Scores pairs of texts: a classifier, most often of one label, the higher the more relevant.

    Args:
        directory: a checkpoint's, or its name on the Hugging Face Hub: a sequence classifier of any
            family that :class:`SentenceEncoder` takes.
        dtype, device, revision, cache_dir, local_files_only, cuda_graphs: as of
            :class:`SentenceEncoder`.
        max_length: tokens of a pair; default what the files say.
        activation_fn: of the scores; default what the files say, else sigmoid for one label and
            nothing for several.

    Raises:
        CheckpointError: naming the file and what is wrong with it, or not supported.
    """

    kind = "AutoModelForSequenceClassification"
    task, model_type = "sequence-classification", "CrossEncoder"

    def __init__(
        self, directory: str | Path, dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu", *, revision: str | None = None,
        cache_dir: str | Path | None = None, local_files_only: bool = False,
        max_length: int | None = None, activation_fn: Callable | None = None,
        cuda_graphs: bool = True,
    ):  # fmt: skip
        self.cuda_graphs = cuda_graphs
        hub = {
            "revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only,
        }  # fmt: skip
        self._load(directory, dtype, device, hub, max_length)
        listed = read_json(self.directory / "modules.json", default=[{}])
        if len(listed) > 1:
            raise CheckpointError(
                f"{self.directory}/modules.json: {listed[1].get('type')} is not supported in a "
                "CrossEncoder"
            )
        self.activation_fn = activation_fn or self._activation()

    def _activation(self):
        path = self.directory / "config.json"
        values = read_json(path)
        theirs = values.get("sentence_transformers") or {}
        name = theirs.get("activation_fn") or values.get("sbert_ce_default_activation_function")
        name = self.settings.get("activation_fn") or name
        if name is not None:
            return read_activation(path, name)
        return nn.Sigmoid() if self.num_labels == 1 else nn.Identity()

    @property
    def num_labels(self) -> int:
        return self.backbone.config.num_labels

    @property
    def max_length(self) -> int:
        """:attr:`max_seq_length`, by sentence-transformers' name."""
        return self.max_seq_length

    @max_length.setter
    def max_length(self, value: int) -> None:
        self.max_seq_length = value

    def predict(
        self, sentences: Iterable[Sequence[str]] | Sequence[str], prompt_name: str | None = None,
        prompt: str | None = None, batch_size: int | None = None,
        show_progress_bar: bool | None = None, activation_fn: Callable | None = None,
        apply_softmax: bool = False, convert_to_numpy: bool = True,
        convert_to_tensor: bool = False, device: Any = None, pool: dict | None = None,
        chunk_size: int | None = None, *, batch_tokens: int = 4096,
    ) -> Any:  # fmt: skip
        """Scores of pairs: (pairs,), or (pairs, num_labels); of one pair its score alone.

        Args:
            sentences: a list of pairs of strings, or one pair.
            prompt, prompt_name: put in front of each pair's first text.
            activation_fn: in place of the model's. apply_softmax: over several labels, after it.
            batch_size, batch_tokens, convert_to_numpy, convert_to_tensor, device, pool, chunk_size:
                as of :meth:`SentenceEncoder.encode`.

        Raises:
            TypeError: something else than pairs of strings.
            ValueError: naming the argument that does not fit.
        """
        if isinstance(sentences, str):
            raise TypeError("sentences must be pairs of strings, not one string")
        pairs: list[Any] = list(sentences)
        single = bool(pairs) and isinstance(pairs[0], str)
        pairs = [pairs] if single else pairs
        for i, pair in enumerate(pairs):
            if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
                raise TypeError(f"sentences[{i}] must be a pair of strings, not {pair!r}")
        check_batches(batch_size, batch_tokens)
        options = dict(
            prompt=self._prompt(prompt, prompt_name), batch_size=batch_size,
            batch_tokens=batch_tokens, activation_fn=activation_fn or self.activation_fn,
            apply_softmax=apply_softmax,
        )  # fmt: skip
        pairs = [tuple(map(str, pair)) for pair in pairs]
        found = self._compute(pairs, options, pool, device, chunk_size, show_progress_bar)
        result = torch.stack(found) if found else torch.empty(0)
        return converted(result, single, convert_to_numpy, convert_to_tensor)

    def rank(
        self, query: str, documents: Sequence[str], top_k: int | None = None,
        return_documents: bool = False, **options: Any,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Documents by their score, the highest first: ``{"corpus_id": place in documents, "score":
        ...}``, with ``return_documents`` also "text". ``options``: as of :meth:`predict`.

        Raises:
            ValueError: the model has more than one label.
        """
        if self.num_labels != 1:
            raise ValueError(
                f"rank is for models of one label, and this one has {self.num_labels}: use predict"
            )
        options |= {"convert_to_tensor": True}
        scores = self.predict([(query, text) for text in documents], **options).tolist()
        found = []
        for i, score in enumerate(scores):
            text = {"text": documents[i]} if return_documents else {}
            found.append({"corpus_id": i, "score": score, **text})
        return sorted(found, key=lambda row: row["score"], reverse=True)[:top_k]

    def _encode(
        self, texts, prompt, batch_size, batch_tokens, activation_fn, apply_softmax,
        advance=lambda count: None,
    ):  # fmt: skip
        encodings = self._tokenize([(prompt + first, second) for first, second in texts])

        def finish(logits, cu_seqlens):
            scores = by_row(activation_fn, logits.float())
            if self.num_labels == 1 and scores.ndim > 1:
                scores = scores.squeeze(-1)
            return torch.softmax(scores, dim=1) if apply_softmax and scores.ndim > 1 else scores

        return self._run(encodings, batch_size, batch_tokens, advance, finish)
