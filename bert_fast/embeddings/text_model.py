"""What SentenceEncoder and CrossEncoder have in common: texts become batches, and batches go
through the encoder, by CUDA graphs where they are small."""

from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
from collections.abc import Iterable

import torch

from bert_fast.embeddings import settings
from bert_fast.embeddings.backbone import load_backbone, padded_batches
from bert_fast.embeddings.graphed import GraphedBackbone
from bert_fast.embeddings.pools import Pools, encode_in_pool
from bert_fast.embeddings.settings import read_settings
from bert_fast.embeddings.tokenizer import (
    Tokenizer,
    batches_by_tokens,
    load_tokenizer_and_settings,
    lower_case,
)
from bert_fast.files import CheckpointError
from bert_fast.models.hub import resolve


class TextModel(Pools):
    """What :class:`SentenceEncoder` and :class:`CrossEncoder` have in common: a directory, its
    tokenizer, its encoder, and the prompts."""

    kind, task, model_type = "AutoModel", "feature-extraction", "SentenceTransformer"

    cuda_graphs = True
    _graphed: GraphedBackbone | None = None

    def _load(self, name, dtype, device, hub, max_seq_length=None):
        self.directory = resolve(name, **hub)
        self.settings = read_settings(
            self.directory / "config_sentence_transformers.json", settings.MODEL
        )
        self._check_kind()
        self.encoder_directory = inner = self._inner(dtype, device)
        paths = [inner / name for name in settings.TRANSFORMER_FILES]
        path = next((path for path in paths if path.is_file()), paths[0])
        own = read_settings(path, settings.TRANSFORMER)
        self._check_transformer(path, own)
        tokenizer, said = load_tokenizer_and_settings(inner)
        if own.get("do_lower_case"):
            lower_case(tokenizer)
        wanted = max_seq_length or own.get("max_seq_length") or said.limit
        positions = self.backbone.positions
        try:
            self.tokenizer = Tokenizer(
                tokenizer, positions, self.backbone.counts_from_padding,
                padding_side=said.padding_side, truncation_side=said.truncation_side,
                model_max_length=min(int(wanted), positions),
            )  # fmt: skip
        except ValueError as error:
            raise CheckpointError(f"{inner}: {error}") from error
        self.takes_types = said.types
        self.prompts = {"query": "", "document": ""} if self.kind == "AutoModel" else {}
        self.prompts |= self.settings.get("prompts") or {}
        self.default_prompt_name = self.settings.get("default_prompt_name")
        if self.default_prompt_name is not None and self.default_prompt_name not in self.prompts:
            raise CheckpointError(
                f"{self.directory}: default_prompt_name is {self.default_prompt_name!r}, which is "
                f"not one of the prompts {sorted(self.prompts)}"
            )

    def _inner(self, dtype, device):
        """Loads the encoder; returns the directory of the Transformer module."""
        self.backbone = load_backbone(self.directory, dtype, device, self.kind)
        return self.directory

    def calibrate(self, texts: Iterable[str]) -> None:
        """Loads the weights again and packs them in int8, by what these texts (some hundred, of the
        kind that will come) show of the model. ValueError: no texts, or the model is on no CPU."""
        if self.device.type != "cpu":
            raise ValueError(f"calibrate is for int8 on a CPU; the model is on {self.device}")
        texts = [texts] if isinstance(texts, str) else list(texts)
        inputs = list(padded_batches(self._tokenize(texts)))
        self.backbone = load_backbone(self.encoder_directory, "int8", "cpu", self.kind, inputs)

    def _check_kind(self):
        kind = self.settings.get("model_type", self.model_type)
        if kind != self.model_type:
            raise CheckpointError(
                f"{self.directory} holds a {kind}, not a {self.model_type} of sentence-transformers"
            )

    def _check_transformer(self, path, own):
        task, modality = own.get("transformer_task", self.task), own.get("modality_config")
        if task != self.task:
            raise CheckpointError(f"{path}: transformer_task is {task!r}, not {self.task!r}")
        wanted = "last_hidden_state" if self.kind == "AutoModel" else "logits"
        text = {"method": "forward", "method_output_name": wanted}
        if modality is not None and modality.get("text") != text:
            raise CheckpointError(f"{path}: modality_config is {modality}; only {text} of text is")
        name = "token_embeddings" if self.kind == "AutoModel" else "scores"
        if own.get("module_output_name", name) != name:
            raise CheckpointError(f"{path}: module_output_name must be {name!r}")

    @property
    def model(self) -> torch.nn.Module:
        """The encoder: a :class:`bert_fast.BertModel`, or an accelerated model of transformers."""
        return self.backbone.model

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    @property
    def max_seq_length(self) -> int:
        """Tokens of a text, special ones among them; what is longer is cut, with a warning."""
        return self.tokenizer.model_max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.tokenizer.model_max_length = value

    max_seqlen = max_seq_length

    def to(self, device: torch.device | str):
        """Moves the model."""
        self._graphed = None  # first: its graphs hold memory
        self.model.to(device)
        return self

    def _prompt(self, prompt, prompt_name):
        if prompt is not None:
            if prompt_name is not None:
                warnings.warn("prompt is given, so prompt_name is not used", stacklevel=4)
            return prompt
        if prompt_name is None:
            prompt_name = self.default_prompt_name
        if prompt_name is None:
            return ""
        if prompt_name not in self.prompts:
            raise ValueError(
                f"prompt_name {prompt_name!r} is not one of the model's {sorted(self.prompts)}"
            )
        return self.prompts[prompt_name] or ""

    def _tokenize(self, texts):
        encodings = self.tokenizer.encodings(texts)
        if truncated := sum(bool(encoding.overflowing) for encoding in encodings):
            warnings.warn(
                f"{truncated} of {len(encodings)} texts were cut to {self.max_seq_length} tokens",
                stacklevel=4,
            )
        return encodings

    def _compute(self, texts, options, pool, device, chunk_size, show_progress_bar):
        """A result a text, by ``self._encode(texts, **options)``: here, or in several processes."""
        if pool is not None or isinstance(device, (list, tuple)):
            return encode_in_pool(self, texts, pool, device, chunk_size, options)
        if device is not None:
            self.to(device)
        with _progress_bar(len(texts), show_progress_bar) as advance:
            return self._encode(texts, advance=advance, **options)

    @torch.inference_mode()
    def _run(self, encodings, batch_size, batch_tokens, advance, finish):
        """``finish(backbone's result, cu_seqlens)`` gives a result a text; in the texts' order."""
        if is_any_in_training(self.model):
            self.model.eval()
        out = [None] * len(encodings)
        lengths = [len(e.ids) for e in encodings]
        for batch in batches_by_tokens(lengths, batch_tokens, batch_size):
            offsets = itertools.accumulate((lengths[i] for i in batch), initial=0)
            cu_seqlens = torch.tensor(list(offsets), dtype=torch.int32, device="cpu")
            tokens = _joined(encodings[i].ids for i in batch)
            if self.takes_types:
                types = _joined(encodings[i].type_ids for i in batch)
            else:
                types = torch.zeros_like(tokens)
            longest = max(lengths[i] for i in batch)
            states, cu_seqlens = self._states(tokens, types, cu_seqlens, longest)
            with self.backbone.around(states.numel()):
                found = finish(states, cu_seqlens)
            for i, result in zip(batch, found, strict=True):
                out[i] = result
            advance(len(batch))
        return out

    def _states(self, tokens, types, cu_seqlens, longest):
        """The backbone's result for packed inputs on the CPU, and cu_seqlens, on the device."""
        device, states = self.device, None
        graphed = self._for_small_batches(device)
        if graphed is None and device.type == "cpu":
            return self.backbone(tokens, types, cu_seqlens, longest), cu_seqlens
        if graphed is not None:
            states = graphed(tokens, types, cu_seqlens, longest)
        moved = cu_seqlens.to(device)
        if states is None:
            tokens, types = (t.to(device) for t in (tokens, types))
            states = self.backbone(tokens, types, moved, longest)
        return states, moved

    def _for_small_batches(self, device):
        """The graphs of the backbone as it is, or None: on a CPU, or where they are not wanted."""
        graphed = self._graphed
        if graphed is None or not graphed.is_of(self.backbone, device):
            wanted = self.cuda_graphs and device.type == "cuda"
            graphed = self._graphed = GraphedBackbone(self.backbone) if wanted else None
        return graphed

    def __getstate__(self):  # graphs are this process's
        return self.__dict__ | {"_graphed": None}


def is_any_in_training(model):
    """Whether one of its modules is: asking all takes less than saying eval() to all."""
    modules = [model]
    for module in modules:
        own = module.__dict__
        if own.get("training", True):
            return True
        modules += [child for child in own["_modules"].values() if child is not None]
    return False


def _joined(lists):
    return torch.tensor([t for of in lists for t in of], dtype=torch.int64, device="cpu")


def converted(result, single, convert_to_numpy, convert_to_tensor):
    """A tensor of results as it was asked for; of one text its result alone."""
    if not convert_to_tensor:
        result = result.cpu().numpy() if convert_to_numpy else list(result)
    return result[0] if single else result


def check_batches(batch_size, batch_tokens):
    for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


@contextlib.contextmanager
def _progress_bar(total, wanted):
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
