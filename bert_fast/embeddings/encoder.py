"""Text in, sentence embeddings out: the checkpoint's own tokenizer, pooling and further modules
around an encoder, by sentence-transformers' names and to its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.embeddings import vectors
from bert_fast.embeddings.backbone import load_backbone
from bert_fast.embeddings.modules import list_modules, load_modules, place
from bert_fast.embeddings.text_model import TextModel, check_batches, converted
from bert_fast.files import CheckpointError

Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]


class SentenceEncoder(TextModel):
    """Embeds texts as sentence-transformers would: the same files, arguments and numbers.

    Args:
        directory: a checkpoint's, or its name on the Hugging Face Hub. config.json, weights, and
            tokenizer.json or vocab.txt; BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA,
            DistilBERT or MPNet. Where sentence-transformers' own files lie beside them
            (modules.json and what it names, sentence_bert_config.json,
            config_sentence_transformers.json), they decide pooling, further modules, the longest
            text, prompts and the similarity; else mean pooling, no normalisation, and the model's
            positions.
        dtype: on a CPU "float32", "bfloat16" or "int8": the precision of the encoder's products,
            by :meth:`bert_fast.BertModel.for_inference` (other families: ``accelerate``), all else
            being float32. On a GPU, or "auto": of the weights. Default: the checkpoint's, but
            float32 for a float16 checkpoint on a CPU.
        device: where the model runs: "cpu" (default), "cuda", or a torch.device.
        revision, cache_dir, local_files_only: see :func:`bert_fast.models.hub.resolve`.
        prompts, default_prompt_name, similarity_fn_name, truncate_dim: in place of the files'.
        cuda_graphs: on a GPU, batches of few tokens whose size was met before replay a CUDA graph
            (:func:`bert_fast.cudagraph`): launching their kernels one by one takes longer than
            they run. The same results; some memory, of 32 graphs at most. False: never.

    Raises:
        CheckpointError: naming the file and what is wrong with it, or what it asks for that is not
            supported.
    """

    def __init__(
        self, directory: str | Path, dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu", *, revision: str | None = None,
        cache_dir: str | Path | None = None, local_files_only: bool = False,
        prompts: dict[str, str] | None = None, default_prompt_name: str | None = None,
        similarity_fn_name: Similarity | None = None, truncate_dim: int | None = None,
        max_seq_length: int | None = None, cuda_graphs: bool = True,
    ):  # fmt: skip
        self.cuda_graphs = cuda_graphs
        hub = {
            "revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only,
        }  # fmt: skip
        self._load(directory, dtype, device, hub, max_seq_length)
        self.prompts |= prompts or {}
        self.default_prompt_name = default_prompt_name or self.default_prompt_name
        self._prompt(None, None)  # that it is there
        self.similarity_fn_name = (
            similarity_fn_name or self.settings.get("similarity_fn_name") or "cosine"
        )
        if self.similarity_fn_name not in vectors.SIMILARITIES:
            raise CheckpointError(
                f"{self.directory}: similarity_fn_name is {self.similarity_fn_name!r}, not one of "
                f"{', '.join(vectors.SIMILARITIES)}"
            )
        self.truncate_dim = truncate_dim or self.settings.get("truncate_dim")

    def _inner(self, dtype, device):
        inner, listed = list_modules(self.directory)
        self.backbone = load_backbone(inner, dtype, device, self.kind)
        self.pooling, *self.modules = load_modules(listed, self.backbone.config.hidden_size)
        for module in self.modules:
            place(module, device)
        return inner

    def to(self, device: torch.device | str):
        """Moves the model and its modules."""
        super().to(device)  # first: it may refuse
        for module in self.modules:
            place(module, device)
        return self

    @property
    def embedding_dimension(self) -> int:
        """Numbers in a vector."""
        width = self.pooling.width(self.backbone.config.hidden_size)
        for module in self.modules:
            width = module.width(width)
        return min(width, self.truncate_dim or width)

    def get_sentence_embedding_dimension(self) -> int:
        """:attr:`embedding_dimension`, by sentence-transformers' name."""
        return self.embedding_dimension

    def tokenize(self, texts: Iterable[str]) -> list[np.ndarray]:
        """A list of int64 arrays of ids; warns of texts cut to ``max_seq_length`` tokens."""
        return [np.asarray(e.ids, dtype=np.int64) for e in self._tokenize(list(texts))]

    def encode(
        self, sentences: str | Iterable[str], prompt_name: str | None = None,
        prompt: str | None = None, batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding", "token_embeddings"] = "sentence_embedding",
        precision: Precision = "float32", convert_to_numpy: bool = True,
        convert_to_tensor: bool = False, device: Any = None, normalize_embeddings: bool = False,
        truncate_dim: int | None = None, pool: dict | None = None, chunk_size: int | None = None,
        *, batch_tokens: int = 4096, progress: bool | None = None,
    ) -> Any:  # fmt: skip
        """Embeddings of texts: (len(sentences), dimension); of one string a vector.

        Texts are sorted by length into batches of at most ``batch_tokens`` real tokens (a longer
        text is a batch of its own) and ``batch_size`` texts (default: as many as fit), packed
        without padding, and put back in order. A text with more than ``max_seq_length`` tokens is
        cut, with a warning.

        Args:
            sentences: a list of strings, or one.
            prompt, prompt_name: put in front of each text, by itself or by its name in ``prompts``;
                default the model's default prompt.
            show_progress_bar (or ``progress``): default, on a terminal, for more than 1,000 texts.
            output_value: "token_embeddings" gives a list of tensors (tokens of a text, hidden).
            precision: of the result: "float32", or quantised as
                :func:`bert_fast.embeddings.vectors.quantize` says.
            convert_to_numpy, convert_to_tensor: an array (the default), or a tensor, on the model's
                device; neither: a list of tensors.
            device: moves the model there; a list of devices spreads the texts over processes.
            normalize_embeddings: to length 1, after cutting.
            truncate_dim: only the first numbers of each vector (Matryoshka models).
            pool, chunk_size: of :meth:`start_multi_process_pool`; texts for a process at a time.

        Raises:
            TypeError: sentences holds something else than strings.
            ValueError: naming the argument that does not fit.
        """
        single = isinstance(sentences, str)
        texts = [sentences] if single else _strings(sentences)
        _check_encode(batch_size, batch_tokens, output_value, precision)
        truncate_dim = self.truncate_dim if truncate_dim is None else truncate_dim
        if truncate_dim is not None and truncate_dim < 1:
            raise ValueError(f"truncate_dim must be at least 1, not {truncate_dim}")
        options = dict(
            prompt=self._prompt(prompt, prompt_name), batch_size=batch_size,
            batch_tokens=batch_tokens, output_value=output_value, truncate_dim=truncate_dim,
            normalize_embeddings=normalize_embeddings,
        )  # fmt: skip
        show = progress if show_progress_bar is None else show_progress_bar
        found = self._compute(texts, options, pool, device, chunk_size, show)
        if output_value == "token_embeddings":
            return found[0] if single else found
        result: Any = torch.stack(found) if found else torch.empty(0, self.embedding_dimension)
        if precision != "float32":
            result = torch.from_numpy(vectors.quantize(result.cpu().numpy(), precision))
        return converted(result, single, convert_to_numpy, convert_to_tensor)

    def encode_query(self, sentences: str | Iterable[str], **options: Any) -> Any:
        """:meth:`encode` with the prompt "query", where no other is given."""
        return self._encode_as("query", sentences, options)

    def encode_document(self, sentences: str | Iterable[str], **options: Any) -> Any:
        """:meth:`encode` with the prompt "document" (or "passage", or "corpus")."""
        return self._encode_as(("document", "passage", "corpus"), sentences, options)

    def _encode_as(self, names, sentences, options):
        if options.get("prompt") is None and options.get("prompt_name") is None:
            names = [names] if isinstance(names, str) else names
            options["prompt_name"] = next((n for n in names if n in self.prompts), None)
        return self.encode(sentences, **options)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """(n, m) scores of all pairs of vectors, by ``similarity_fn_name``."""
        return vectors.similarity(self.similarity_fn_name, embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """(n,) scores of vectors that stand together."""
        return vectors.similarity(self.similarity_fn_name, embeddings1, embeddings2, pairwise=True)

    def pool(self, hidden: Tensor, cu_seqlens: Tensor, prompt_length: int = 0) -> Tensor:
        """Packed token vectors to sentence embeddings, as the checkpoint's own files say."""
        pooled = self.pooling.pool(hidden.float(), cu_seqlens, prompt_length)
        for module in self.modules:
            pooled = module(pooled)
        return pooled

    def _encode(
        self, texts, prompt, batch_size, batch_tokens, output_value, truncate_dim,
        normalize_embeddings, advance=lambda count: None,
    ):  # fmt: skip
        encodings = self._tokenize([prompt + text for text in texts])
        prompt_length = 0
        if prompt and not self.pooling.include_prompt:
            prompt_length = _length_of_prompt(self.tokenizer.encode(prompt))

        def finish(hidden, cu_seqlens):
            if output_value == "token_embeddings":
                return hidden.split(cu_seqlens.diff().tolist())
            pooled = self.pool(hidden, cu_seqlens, prompt_length)
            if truncate_dim is not None:
                pooled = pooled[:, :truncate_dim]
            return F.normalize(pooled, dim=1) if normalize_embeddings else pooled

        return self._run(encodings, batch_size, batch_tokens, advance, finish)

    def encode_ids(
        self, ids: Sequence[np.ndarray], batch_tokens: int = 4096,
        advance: Callable[[int], None] = lambda count: None,
    ) -> np.ndarray:  # fmt: skip
        """:meth:`encode` of texts that :meth:`tokenize` has tokenized; ``advance`` is told how many
        are done."""
        encodings = [_Ids(i) for i in ids]
        found = self._run(encodings, None, batch_tokens, advance, self.pool)
        width = self.embedding_dimension
        return np.stack([v.cpu().numpy() for v in found]) if found else np.empty((0, width), "f4")


class _Ids:
    def __init__(self, ids):
        self.ids, self.type_ids = ids, np.zeros_like(ids)


def _length_of_prompt(encoding):
    """Without a special token at its end, as sentence-transformers counts it."""
    return len(encoding.ids) - bool(encoding.special_tokens_mask[-1])


def _strings(sentences):
    texts = list(sentences)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"sentences[{i}] must be a string, not {type(text).__name__}")
    return [str(text) for text in texts]


def _check_encode(batch_size, batch_tokens, output_value, precision):
    check_batches(batch_size, batch_tokens)
    if output_value not in ("sentence_embedding", "token_embeddings"):
        raise ValueError(
            f"output_value must be 'sentence_embedding' or 'token_embeddings', not {output_value!r}"
        )
    if output_value == "token_embeddings" and precision != "float32":
        raise ValueError("precision is of sentence embeddings; token embeddings are float32")
    if precision not in vectors.PRECISIONS:
        raise ValueError(
            f"precision must be one of {', '.join(vectors.PRECISIONS)}, not {precision!r}"
        )
