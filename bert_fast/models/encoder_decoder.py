"""BERT reads, a second BERT writes: Hugging Face's ``EncoderDecoderModel`` (Rothe et al. 2020), for
translation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_fast.models import checkpoint
from bert_fast.models.bert import BertModel
from bert_fast.models.blocks import check_ids, exportable, prepack
from bert_fast.models.config import BertConfig, read_json
from bert_fast.models.decoder import Decoder
from bert_fast.models.generation import Decoding, beam_search, greedy
from bert_fast.models.packing import Packing
from bert_fast.ops.cross_entropy import IGNORED


@dataclass
class EncoderDecoderConfig:
    """Hugging Face's, with the defaults of BERT's vocabulary: decoding starts with [CLS] and ends
    with [SEP]."""

    encoder: BertConfig
    decoder: BertConfig
    decoder_start_token_id: int = 101
    eos_token_id: int = 102
    pad_token_id: int = 0

    def __post_init__(self):
        if self.encoder.hidden_size != self.decoder.hidden_size:
            raise ValueError(
                f"config: the encoder's hidden_size is {self.encoder.hidden_size}, the decoder's "
                f"{self.decoder.hidden_size}: they must agree"
            )
        for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < self.decoder.vocab_size:
                raise ValueError(
                    f"config: {name} must be one of the decoder's {self.decoder.vocab_size} "
                    f"tokens, not {value!r}"
                )

    @property
    def max_position_embeddings(self):
        """That a text and its translation both have."""
        return min(self.encoder.max_position_embeddings, self.decoder.max_position_embeddings)

    @classmethod
    def from_json(cls, path, **changes):
        """Reads ``config.json``; ``changes`` stand in the place of what it says.

        Raises:
            ValueError: not JSON, or something else than two BERTs.
        """
        values = read_json(path)
        if not isinstance(values, dict) or values.get("model_type") != "encoder-decoder":
            raise ValueError(f"{path} is not an encoder-decoder's")
        parts = {
            name: BertConfig.from_dict(values.get(name), f"{path}: {name}")
            for name in ("encoder", "decoder")
        }
        ids = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
        given = {name: values[name] for name in ids if values.get(name) is not None}
        return cls(**parts, **{**given, **changes})

    @classmethod
    def from_config(cls, config, **changes):
        raise TypeError("from_pretrained: config= is not supported for an encoder-decoder")

    def to_json(self, architecture="EncoderDecoderModel"):
        values = {
            "architectures": [architecture],
            "model_type": "encoder-decoder",
            "is_encoder_decoder": True,
            "encoder": self.encoder.to_dict(),
            "decoder": self.decoder.to_dict() | {"is_decoder": True, "add_cross_attention": True},
            "decoder_start_token_id": self.decoder_start_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
        }
        return json.dumps(values, indent=2) + "\n"


@exportable
class Seq2SeqPrediction(NamedTuple):
    """loss: None without labels. logits: (batch, seqlen, vocab); None *with* labels."""

    loss: Tensor | None
    logits: Tensor | None
    encoder_last_hidden_state: Tensor


class EncoderDecoderModel(nn.Module):
    """Hugging Face's model of the same name, of two BERTs, in results and checkpoints."""

    def __init__(self, config: EncoderDecoderConfig, add_pooling_layer: bool = True):
        super().__init__()
        self.config = config
        self.encoder = BertModel(config.encoder, add_pooling_layer)
        self.decoder = Decoder(config.decoder)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, dtype: torch.dtype | str | None = None, **options: Any
    ) -> EncoderDecoderModel:
        """A checkpoint of Hugging Face's ``EncoderDecoderModel``, of two BERTs. ``options``: as
        :meth:`bert_fast.BertModel.from_pretrained` takes them.

        Raises:
            CheckpointError: naming the file, and the keys that are missing or misshapen.
        """

        def make(config, state):
            return cls(config, any(key.startswith("encoder.pooler.") for key in state))

        return checkpoint.load(make, directory, EncoderDecoderConfig, dtype=dtype, **options)

    @classmethod
    def from_encoder_pretrained(
        cls, directory: str | Path, decoder: BertConfig, dtype: torch.dtype | None = None,
        **token_ids: int,
    ) -> EncoderDecoderModel:  # fmt: skip
        """An encoder from a BERT checkpoint, a new decoder to be trained.

        Args:
            directory: of the checkpoint.
            decoder: the decoder's :class:`~bert_fast.BertConfig`.
            token_ids: ``decoder_start_token_id``, ``eos_token_id``, ``pad_token_id``.
        """
        encoder = BertModel.from_pretrained(directory, dtype)
        config = EncoderDecoderConfig(encoder.config, decoder, **token_ids)
        model = cls(config, add_pooling_layer=False)
        model.encoder = encoder
        return model.to(dtype or next(encoder.parameters()).dtype)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes what Hugging Face's ``EncoderDecoderModel`` loads."""
        checkpoint.save(self, directory)

    def prepack(self) -> EncoderDecoderModel:
        """As :meth:`bert_fast.BertModel.prepack`."""
        return prepack(self)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None, decoder_attention_mask: Tensor | None = None, *,
        token_type_ids: Tensor | None = None, labels: Tensor | None = None,
    ) -> Seq2SeqPrediction:  # fmt: skip
        """What the decoder says after each of its tokens.

        Args:
            input_ids, attention_mask, token_type_ids: as :class:`bert_fast.BertModel` has them.
            decoder_input_ids: (batch, seqlen); default the labels, moved one to the right after
                ``decoder_start_token_id``.
            decoder_attention_mask: like decoder_input_ids; default all ones, or with labels ones
                but at padding.
            labels: (batch, seqlen), -100 to be ignored. Logits are computed without labels alone.
                Where one is ignored and another follows, the decoder reads ``pad_token_id``
                between them (Hugging Face hides it).

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        name = "decoder_input_ids"
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("decoder_input_ids or labels must be given")
            name, (decoder_input_ids, padding) = "labels", self._shifted(labels)
            if decoder_attention_mask is None:
                decoder_attention_mask = padding
        check_ids(name, decoder_input_ids, self.config.decoder.vocab_size)
        if decoder_input_ids.ndim != 2 or len(decoder_input_ids) != len(input_ids):
            raise ValueError(
                f"{name} must be ({len(input_ids)}, seqlen), not {tuple(decoder_input_ids.shape)}"
            )
        if labels is not None and labels.shape != decoder_input_ids.shape:
            raise ValueError(
                f"labels must have decoder_input_ids' shape {tuple(decoder_input_ids.shape)}, "
                f"not {tuple(labels.shape)}"
            )
        self._check_length(decoder_input_ids.shape[1], f"{name} hold")
        (memory,), source = self.encoder.encode(input_ids, attention_mask, token_type_ids)
        if decoder_attention_mask is None:
            batch, seqlen = decoder_input_ids.shape
            packing = Packing.of_full(batch, seqlen, decoder_input_ids.device)
        else:
            packing = Packing.of_mask(decoder_attention_mask).to(decoder_input_ids.device)
        hidden = self.decoder(packing.pack(decoder_input_ids), packing, memory, source)
        last = source.unpack(memory)
        if labels is None:
            return Seq2SeqPrediction(None, self.decoder.logits(packing.unpack(hidden)), last)
        labels = packing.pack(labels)
        if packing.padded_tail:  # its rows repeat some place
            labels = labels.masked_fill(packing.index >= packing.batch * packing.seqlen, IGNORED)
        return Seq2SeqPrediction(self.decoder.loss(hidden, labels), None, last)

    def _shifted(self, labels):
        """The decoder's tokens, and which of them matter: none after the last label."""
        ids = F.pad(labels[:, :-1], (1, 0), value=self.config.decoder_start_token_id)
        ids = ids.masked_fill(ids == IGNORED, self.config.pad_token_id)
        return ids, (labels != IGNORED).flip(1).long().cummax(1).values.flip(1)

    def _check_length(self, length, what):
        positions = self.config.decoder.max_position_embeddings
        if length > positions:
            raise ValueError(f"{what} {length} tokens; the decoder has {positions} positions")

    # -- decoding --

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, *, num_beams: int = 1,
        max_new_tokens: int | None = None, length_penalty: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """The most probable continuations, as Hugging Face's ``generate`` finds them: greedily, or
        by beam search (``early_stopping=False``).

        Each token's keys and values are kept, so a step computes one token a sentence; sentences
        that have ended cost nothing.

        Args:
            num_beams: continuations kept at a time; 1 is greedy.
            max_new_tokens: after which a sentence ends without ``eos_token_id``; default 128, or as
                many as the decoder has positions.
            length_penalty: beams are compared by log-probability / length ** length_penalty.

        Returns:
            int64 (batch, up to 1 + max_new_tokens): ``decoder_start_token_id`` first, the end
            filled with ``pad_token_id``.

        Raises:
            ValueError: naming the argument that does not fit.
        """
        if max_new_tokens is None:
            max_new_tokens = min(128, self.config.decoder.max_position_embeddings)
        for name, value in (("num_beams", num_beams), ("max_new_tokens", max_new_tokens)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        self._check_length(max_new_tokens, "max_new_tokens wants")
        if self.training:
            raise RuntimeError("generate is for inference: call eval() first")
        (memory,), source = self.encoder.encode(input_ids, attention_mask, token_type_ids)
        decoding = Decoding(self.decoder, memory, source, num_beams, max_new_tokens)
        if num_beams == 1:
            return greedy(decoding, self.config)
        return beam_search(decoding, self.config, length_penalty)
