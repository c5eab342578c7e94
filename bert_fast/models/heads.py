"""BERT's task heads, with Hugging Face's names, outputs, losses and checkpoints.

Every ``forward`` takes what :class:`bert_fast.BertModel` takes, and labels; labels of -100 count
for nothing. ``num_items_in_batch``, which transformers' Trainer gives, is what a loss is divided by
in the place of its own number of labels. Results are named tuples with Hugging Face's fields.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_fast import ops
from bert_fast.models import checkpoint
from bert_fast.models.bert import BertModel
from bert_fast.models.blocks import GELU_APPROXIMATE, Linear, exportable, initialiser, prepack
from bert_fast.models.config import BertConfig
from bert_fast.models.inference import Served, for_inference
from bert_fast.ops.cross_entropy import IGNORED, linear_cross_entropy

if TYPE_CHECKING:
    from typing_extensions import Self


def _without_none(self, key):
    """A slice leaves out what is None, as those of transformers' outputs do: its Trainer takes
    ``outputs[1:]`` for tensors."""
    item = tuple.__getitem__(self, key)
    return tuple(i for i in item if i is not None) if isinstance(key, slice) else item


@exportable
class Prediction(NamedTuple):
    """loss: None without labels. logits: of a masked language model None *with* labels."""

    loss: Tensor | None
    logits: Tensor | None
    hidden_states: tuple[Tensor, ...] | None = None

    def __getitem__(self, key):
        return _without_none(self, key)


@exportable
class PreTrainingPrediction(NamedTuple):
    """loss: the sum of masked_lm_loss and next_sentence_loss. masked_lm_correct: how many masked
    words got their highest score."""

    loss: Tensor | None
    prediction_logits: Tensor | None
    seq_relationship_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    masked_lm_loss: Tensor | None = None
    next_sentence_loss: Tensor | None = None
    masked_lm_correct: Tensor | None = None

    def __getitem__(self, key):
        return _without_none(self, key)


@exportable
class SpanPrediction(NamedTuple):
    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None

    def __getitem__(self, key):
        return _without_none(self, key)


def _share(loss, labels, num_items_in_batch):
    """A mean over labels as a sum over the ``num_items_in_batch`` labels of several batches, whose
    gradients transformers' Trainer adds up."""
    if num_items_in_batch is None or loss is None:
        return loss
    return loss * (labels != IGNORED).sum() / num_items_in_batch


class _BertWithHead(nn.Module):
    pooled = True  # whether the head reads the pooler's output
    labelled: str | None = None  # the module whose size is the number of labels

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.bert = BertModel(config, add_pooling_layer=self.pooled)

    def _init_head(self):
        for name, module in self.named_children():
            if name != "bert":
                module.apply(initialiser(self.config))

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, dtype: torch.dtype | str | None = None, **config: Any
    ) -> Self:
        """A Hugging Face BERT checkpoint, of this task or of another: a head that is not in it, or
        has another number of labels, is newly initialised, with a warning. ``config``: changes,
        such as ``id2label`` or ``num_labels``; and the options of
        :meth:`bert_fast.BertModel.from_pretrained`.

        Raises:
            CheckpointError: naming the file, and the keys that are missing or misshapen.
        """
        if num_labels := config.pop("num_labels", None):
            config.setdefault("id2label", {i: f"LABEL_{i}" for i in range(num_labels)})
            if len(config["id2label"]) != num_labels:
                raise ValueError(
                    f"num_labels is {num_labels}; id2label names {len(config['id2label'])}"
                )
        if "id2label" in config:
            config["label2id"] = {label: i for i, label in config["id2label"].items()}
        return checkpoint.load(
            lambda config, state: cls(config), directory, head=cls.labelled, dtype=dtype, **config
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes what Hugging Face's class of the same name loads."""
        checkpoint.save(self, directory)

    def prepack(self) -> Self:
        """As :meth:`bert_fast.BertModel.prepack`."""
        return prepack(self)

    def for_inference(
        self, dtype: Served | torch.dtype = "float32",
        calibration: Iterable[dict[str, torch.Tensor]] | None = None,
    ) -> Self:  # fmt: skip
        """As :meth:`bert_fast.BertModel.for_inference`."""
        return for_inference(self, dtype, calibration)


class _Dropout(nn.Dropout):
    def __init__(self, config):
        p = config.classifier_dropout
        super().__init__(config.hidden_dropout_prob if p is None else p)


class _Transform(nn.Module):
    """Linear, GELU, layer-norm, in front of the vocabulary."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.approximate = GELU_APPROXIMATE[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x):
        norm = self.LayerNorm
        x = ops.linear_gelu(x, self.dense.weight, self.dense.bias, approximate=self.approximate)
        return ops.layer_norm(x, norm.weight, norm.bias, eps=norm.eps)


class _Vocabulary(nn.Module):
    """Scores of all words. Their weight is the embeddings', and not kept here, but where the config
    does not tie them."""

    def __init__(self, config):
        super().__init__()
        self.transform = _Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        if not config.tie_word_embeddings:
            self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def weight(self, embeddings):
        """(vocab_size, hidden), of the embeddings or its own."""
        return self.decoder.weight if hasattr(self, "decoder") else embeddings.word.weight

    def forward(self, hidden, weight):
        return F.linear(self.transform(hidden), weight, self.bias)

    def loss(self, hidden, weight, labels):
        """Of the rows whose label is not ignored, which are the only ones that are computed; and
        how many of them come out right."""
        hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        if hidden.shape[0] != labels.shape[0]:
            raise ValueError(f"labels must be one a token, {hidden.shape[0]}, not {labels.numel()}")
        if torch.compiler.is_compiling():  # how many rows there are must not be asked
            hidden = self.transform(hidden)
            return linear_cross_entropy(hidden, weight, self.bias, labels, ignore=True)
        rows = (labels != IGNORED).nonzero().squeeze(1)
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
        if ops.is_concrete(labels) and labels.numel():
            low, high = (int(bound) for bound in torch.aminmax(labels))
            if low < 0 or high >= len(weight):
                raise ValueError(
                    f"labels must be {IGNORED} or 0 to {len(weight) - 1}, not {low} to {high}"
                )
        return linear_cross_entropy(self.transform(hidden), weight, self.bias, labels)


class PreTrainingHeads(nn.Module):
    def __init__(self, config, words=True, sentences=True):
        super().__init__()
        if words:
            self.predictions = _Vocabulary(config)
        if sentences:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)


class BertForPreTraining(_BertWithHead):
    """Masked language model and next-sentence prediction."""

    def __init__(self, config):
        super().__init__(config)
        self.cls = PreTrainingHeads(config)
        self._init_head()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, *,
        labels: Tensor | None = None, next_sentence_label: Tensor | None = None,
        num_items_in_batch: Any = None, **kwargs: Any,
    ) -> PreTrainingPrediction:  # fmt: skip
        """labels: like input_ids, -100 but at masked tokens; next_sentence_label: (batch,), 0 where
        the second sentence follows the first. Word logits are computed without labels alone."""
        out = self.bert(input_ids, attention_mask, token_type_ids, position_ids, **kwargs)
        words = self.cls.predictions.weight(self.bert.embeddings)
        sentences = self.cls.seq_relationship(out.pooler_output)
        logits = masked = following = correct = None
        if labels is None:
            logits = self.cls.predictions(out.last_hidden_state, words)
        else:
            masked, correct = self.cls.predictions.loss(out.last_hidden_state, words, labels)
            masked = _share(masked, labels, num_items_in_batch)
        if next_sentence_label is not None:
            following = F.cross_entropy(sentences.float(), next_sentence_label.view(-1))
        losses = [loss for loss in (masked, following) if loss is not None]
        total: Any = sum(losses) if losses else None
        return PreTrainingPrediction(
            total, logits, sentences, out.hidden_states,
            masked, following, correct,
        )  # fmt: skip


class BertForMaskedLM(_BertWithHead):
    pooled = False

    def __init__(self, config):
        super().__init__(config)
        self.cls = PreTrainingHeads(config, sentences=False)
        self._init_head()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, *,
        labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any,
    ) -> Prediction:  # fmt: skip
        """labels: like input_ids, -100 but at masked tokens. Logits are computed without labels
        alone."""
        out = self.bert(input_ids, attention_mask, token_type_ids, position_ids, **kwargs)
        words = self.cls.predictions.weight(self.bert.embeddings)
        if labels is None:
            logits = self.cls.predictions(out.last_hidden_state, words)
            return Prediction(None, logits, out.hidden_states)
        loss, _ = self.cls.predictions.loss(out.last_hidden_state, words, labels)
        loss = _share(loss, labels, num_items_in_batch)
        return Prediction(loss, None, out.hidden_states)


class BertForNextSentencePrediction(_BertWithHead):
    def __init__(self, config):
        super().__init__(config)
        self.cls = PreTrainingHeads(config, words=False)
        self._init_head()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, *,
        labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any,
    ) -> Prediction:  # fmt: skip
        """labels: (batch,), 0 where the second sentence follows the first, else 1."""
        out = self.bert(input_ids, attention_mask, token_type_ids, position_ids, **kwargs)
        logits = self.cls.seq_relationship(out.pooler_output)
        loss = None if labels is None else F.cross_entropy(logits, labels.view(-1))
        loss = _share(loss, labels, num_items_in_batch)
        return Prediction(loss, logits, out.hidden_states)


class BertForSequenceClassification(_BertWithHead):
    """One label of many, many labels, or (with a single label) regression."""

    labelled = "classifier"

    def __init__(self, config):
        super().__init__(config)
        self.dropout = _Dropout(config)
        self.classifier = Linear(config.hidden_size, config.num_labels)
        self._init_head()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, *,
        labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any,
    ) -> Prediction:  # fmt: skip
        """labels: (batch,) integers; or (batch, num_labels) of zeros and ones, floating; or
        (batch,) numbers where there is a single label. ``config.problem_type`` says which, else
        the labels do."""
        out = self.bert(input_ids, attention_mask, token_type_ids, position_ids, **kwargs)
        logits = self.classifier(self.dropout(out.pooler_output))
        loss = None if labels is None else self._loss(logits, labels)
        loss = _share(loss, labels, num_items_in_batch)
        return Prediction(loss, logits, out.hidden_states)

    def _loss(self, logits, labels):
        problem = self.config.problem_type
        if problem is None and self.config.num_labels == 1:
            problem = "regression"
        if problem is None:
            integers = not labels.is_floating_point()
            problem = f"{'single' if integers else 'multi'}_label_classification"
        if problem == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
        if problem == "single_label_classification":
            return F.cross_entropy(logits, labels.view(-1))
        if problem == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels)
        raise ValueError(f"config: problem_type {problem!r} is not known")


class BertForTokenClassification(_BertWithHead):
    pooled = False
    labelled = "classifier"

    def __init__(self, config):
        super().__init__(config)
        self.dropout = _Dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self._init_head()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, *,
        labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any,
    ) -> Prediction:  # fmt: skip
        """labels: like input_ids."""
        out = self.bert(input_ids, attention_mask, token_type_ids, position_ids, **kwargs)
        logits = self.classifier(self.dropout(out.last_hidden_state))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))
        loss = _share(loss, labels, num_items_in_batch)
        return Prediction(loss, logits, out.hidden_states)


class BertForQuestionAnswering(_BertWithHead):
    """Scores of each token as first and last of the answer. Padding gets the lowest number there is
    and no share of the loss; Hugging Face lets it take one."""

    pooled = False

    def __init__(self, config):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self._init_head()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, *,
        start_positions: Tensor | None = None, end_positions: Tensor | None = None,
        num_items_in_batch: Any = None, **kwargs: Any,
    ) -> SpanPrediction:  # fmt: skip
        """start_positions, end_positions: (batch,); those past the end are ignored."""
        if kwargs.get("cu_seqlens") is not None:
            raise ValueError("cu_seqlens: question answering takes (batch, seqlen) input alone")
        out = self.bert(input_ids, attention_mask, token_type_ids, position_ids, **kwargs)
        logits = self.qa_outputs(out.last_hidden_state)
        if attention_mask is not None:
            lowest = torch.finfo(logits.dtype).min
            hidden = ~attention_mask.to(logits.device).bool()
            logits = logits.masked_fill(hidden[..., None], lowest)
        start, end = logits.unbind(-1)
        loss: Any = None
        if start_positions is not None and end_positions is not None:
            length = start.shape[1]
            positions = (p.view(-1).clamp(0, length) for p in (start_positions, end_positions))
            loss = sum(
                F.cross_entropy(scores, place, ignore_index=length) / 2
                for scores, place in zip((start, end), positions, strict=True)
            )
            loss = _share(loss, start_positions, num_items_in_batch)
        return SpanPrediction(loss, start, end, out.hidden_states)


class BertForMultipleChoice(_BertWithHead):
    """input_ids and what goes with them: (batch, choices, seqlen)."""

    def __init__(self, config):
        super().__init__(config)
        self.dropout = _Dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self._init_head()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, *,
        labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any,
    ) -> Prediction:  # fmt: skip
        """labels: (batch,), the right choice."""
        if input_ids.ndim != 3:
            raise ValueError(
                f"input_ids must be (batch, choices, seqlen), not {tuple(input_ids.shape)}"
            )
        flat = (
            None if t is None else t.reshape(-1, t.shape[-1])
            for t in (input_ids, attention_mask, token_type_ids, position_ids)
        )
        out = self.bert(*flat, **kwargs)
        logits = self.classifier(self.dropout(out.pooler_output)).view(input_ids.shape[:2])
        loss = None if labels is None else F.cross_entropy(logits, labels)
        loss = _share(loss, labels, num_items_in_batch)
        return Prediction(loss, logits, out.hidden_states)
