"""BERT reads, a second BERT writes: Hugging Face's ``EncoderDecoderModel`` (Rothe et al. 2020), for
translation. The decoder's layers have causal self-attention, and attention to what was read.

Everything is packed, decoding too: a step is one query a sentence that is not finished yet.
"""

import json
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_fast import ops
from bert_fast.models import checkpoint
from bert_fast.models.bert import (
    Attention,
    BertConfig,
    BertModel,
    Embeddings,
    FeedForward,
    check_ids,
    exportable,
    initialiser,
    read_json,
)
from bert_fast.models.blocks import Linear, project_add_norm
from bert_fast.models.heads import PreTrainingHeads
from bert_fast.models.packing import Packing
from bert_fast.models.workspace import NoWorkspace, Workspace, can_reuse_memory
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
    def from_json(cls, path):
        """Reads ``config.json``.

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
        return cls(**parts, **{name: values[name] for name in ids if values.get(name) is not None})

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


class CausalAttention(Attention):
    causal = True

    def step(self, x, decoding, cache, workspace):
        """One token of each live row, which sees the tokens before it. ``cache`` is (rows,
        capacity, 2, num_heads, head_dim), keys and values so far; this token's are added."""
        (tokens, hidden), take = x.shape, workspace.take
        heads = self.num_heads, self.head_dim
        qkv = self.qkv.matmul(x, take("qkv", tokens, 3 * hidden, x), workspace)
        qkv = qkv.view(tokens, 3, *heads)
        cache[decoding.live, decoding.position] = qkv[:, 1:]
        k, v = cache.flatten(0, 1).unbind(1)
        context = take("hidden", tokens, hidden, x)
        context = ops.attention(
            qkv[:, 0], k, v, decoding.own_queries, decoding.own_keys,
            max_seqlen=1, max_seqlen_k=decoding.capacity, bias=self.qkv.bias.view(3, *heads),
            out=None if context is None else context.view(tokens, *heads),
        ).view(tokens, hidden)  # fmt: skip
        return project_add_norm(context, self.out, self.norm, x, 0.0, workspace)


class CrossAttention(nn.Module):
    """Queries of the decoder's tokens, keys and values of the encoder's."""

    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = hidden // self.num_heads
        self.dropout_p = config.attention_probs_dropout_prob
        self.hidden_dropout_p = config.hidden_dropout_prob
        self.q = Linear(hidden, hidden)
        self.kv = Linear(hidden, 2 * hidden)
        self.out = Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)

    def keys_and_values(self, memory):
        """(tokens, 2, num_heads, head_dim) of the encoder's output; their bias is added later."""
        kv = self.kv.matmul(memory, None, NoWorkspace())
        return kv.view(len(memory), 2, self.num_heads, self.head_dim)

    def forward(self, x, cu_seqlens, max_seqlen, kv, source, workspace, padded_tail=False):
        """x: (total_tokens, hidden), divided by cu_seqlens. kv: :meth:`keys_and_values` of the
        texts in ``source``, their packing."""
        (tokens, hidden), heads = x.shape, (self.num_heads, self.head_dim)
        q = self.q.matmul(x, workspace.take("q", tokens, hidden, x), workspace)
        k, v = kv.unbind(1)
        context = workspace.take("hidden", tokens, hidden, x)
        context = ops.attention(
            q.view(tokens, *heads), k, v, cu_seqlens, source.cu_seqlens,
            max_seqlen=max_seqlen, max_seqlen_k=source.max_seqlen,
            bias=torch.cat([self.q.bias, self.kv.bias]).view(3, *heads),
            dropout_p=self.dropout_p if self.training else 0.0,
            padded_tail=padded_tail or source.padded_tail,
            out=None if context is None else context.view(tokens, *heads),
        ).view(tokens, hidden)  # fmt: skip
        dropout_p = self.hidden_dropout_p if self.training else 0.0
        return project_add_norm(context, self.out, self.norm, x, dropout_p, workspace)


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = CausalAttention(config)
        self.cross_attention = CrossAttention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x, packing, memory, source, workspace):
        x = self.attention(x, packing, workspace)
        kv = self.cross_attention.keys_and_values(memory)
        x = self.cross_attention(
            x, packing.cu_seqlens, packing.max_seqlen, kv, source, workspace, packing.padded_tail
        )
        return self.feed_forward(x, workspace)

    def step(self, x, decoding, cache, kv, workspace):
        x = self.attention.step(x, decoding, cache, workspace)
        x = self.cross_attention(
            x, decoding.queries, decoding.beams, kv, decoding.source, workspace
        )
        return self.feed_forward(x, workspace)


class DecoderStack(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))


class Decoder(nn.Module):
    """Hugging Face's ``BertLMHeadModel`` with cross-attention; scores share the embeddings'
    weight."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bert = DecoderStack(config)
        self.cls = PreTrainingHeads(config, sentences=False)
        self.workspace = Workspace()
        self.apply(initialiser(config))

    def forward(self, input_ids, packing, memory, source):
        """Packed ids to packed hidden states."""
        x = self.bert.embeddings(input_ids, packing.positions(), None)
        workspace = self.workspace if can_reuse_memory(x) else NoWorkspace()
        for layer in self.bert.layers:
            x = layer(x, packing, memory, source, workspace)
        return x

    def logits(self, hidden):
        return self.cls.predictions(hidden, self.bert.embeddings.word.weight)

    def loss(self, hidden, labels):
        return self.cls.predictions.loss(hidden, self.bert.embeddings.word.weight, labels)[0]


class EncoderDecoderModel(nn.Module):
    """Hugging Face's model of the same name, of two BERTs, in results and checkpoints."""

    def __init__(self, config, add_pooling_layer=True):
        super().__init__()
        self.config = config
        self.encoder = BertModel(config.encoder, add_pooling_layer)
        self.decoder = Decoder(config.decoder)

    @classmethod
    def from_pretrained(cls, directory, dtype=None):
        """A checkpoint of Hugging Face's ``EncoderDecoderModel``, of two BERTs.

        Raises:
            CheckpointError: naming the file, and the keys that are missing or misshapen.
        """

        def make(config, state):
            return cls(config, any(key.startswith("encoder.pooler.") for key in state))

        return checkpoint.load(make, directory, dtype, EncoderDecoderConfig)

    @classmethod
    def from_encoder_pretrained(cls, directory, decoder, dtype=None, **token_ids):
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

    def save_pretrained(self, directory):
        """Writes what Hugging Face's ``EncoderDecoderModel`` loads."""
        checkpoint.save(self, directory)

    def prepack(self):
        """As :meth:`bert_fast.BertModel.prepack`."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.prepack()
        return self

    def forward(
        self, input_ids, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None,
        *, token_type_ids=None, labels=None,
    ):  # fmt: skip
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
            packing = Packing.of_full(*decoder_input_ids.shape, decoder_input_ids.device)
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
        self, input_ids, attention_mask=None, token_type_ids=None, *, num_beams=1,
        max_new_tokens=None, length_penalty=1.0,
    ):  # fmt: skip
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
        decoding = _Decoding(self.decoder, memory, source, num_beams, max_new_tokens)
        if num_beams == 1:
            return _greedy(decoding, self.config)
        return _beam_search(decoding, self.config, length_penalty)


class _Decoding:
    """What decoding carries from token to token. Rows are sentences, or their beams, each with room
    for ``capacity`` tokens; those that go on are ``live``.

    Two sequences a row tell the ops where its keys are: what it has said, and the empty rest of its
    room, to which no query belongs. So nothing is moved when sentences end or lengths grow.
    """

    def __init__(self, decoder, memory, source, beams, capacity):
        self.decoder, self.source, self.beams, self.capacity = decoder, source, beams, capacity
        self.batch, self.device = source.cu_seqlens.numel() - 1, memory.device
        self.rows, self.position = self.batch * beams, 0
        attention = [layer.cross_attention for layer in decoder.bert.layers]
        self.memory = [a.keys_and_values(memory) for a in attention]
        room = self.rows, capacity, 2
        self.caches = [memory.new_empty(*room, a.num_heads, a.head_dim) for a in attention]
        self.starts = torch.arange(self.rows + 1, device=self.device) * capacity

    def step(self, tokens, live):
        """Log-probabilities, up to a constant a row, of what follows ``tokens``, one a live row:
        (live rows, vocab)."""
        self.live = live
        counts = torch.zeros(self.rows, dtype=torch.int32, device=self.device)
        counts[live] = 1
        self.own_queries = _offsets(torch.stack([counts, torch.zeros_like(counts)], 1).flatten())
        ends = torch.stack([self.starts[:-1], self.starts[:-1] + self.position + 1], 1).flatten()
        self.own_keys = torch.cat([ends, self.starts[-1:]]).int()
        self.queries = _offsets(counts.view(self.batch, self.beams).sum(1, dtype=torch.int32))
        stack = self.decoder.bert
        x = stack.embeddings(tokens, torch.full_like(tokens, self.position), None)
        workspace = self.decoder.workspace if can_reuse_memory(x) else NoWorkspace()
        for layer, cache, kv in zip(stack.layers, self.caches, self.memory, strict=True):
            x = layer.step(x, self, cache, kv, workspace)
        self.position += 1
        return self.decoder.logits(x)

    def reorder(self, rows, sources):
        """What ``rows`` have said becomes what ``sources`` had."""
        for cache in self.caches:
            cache[rows, : self.position] = cache[sources, : self.position]


def _offsets(counts):
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def _said(decoding, config):
    """Padding to write to, after the token that starts."""
    said = torch.full(
        (decoding.rows, decoding.capacity + 1), config.pad_token_id, device=decoding.device
    )
    said[:, 0] = config.decoder_start_token_id
    return said


def _greedy(decoding, config):
    said = _said(decoding, config)
    live = torch.arange(decoding.rows, device=decoding.device)
    while len(live) and decoding.position < decoding.capacity:
        best = decoding.step(said[live, decoding.position], live).argmax(1)
        said[live, decoding.position] = best
        live = live[best != config.eos_token_id]
    return said[:, : decoding.position + 1]


def _beam_search(decoding, config, length_penalty):
    """A sentence is open while its best beam, were it to end now, would be among its best ends."""
    batch, beams, device = decoding.batch, decoding.beams, decoding.device
    said = _said(decoding, config).view(batch, beams, -1)
    ended = said.clone()
    scores = torch.full((batch, beams), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all beams are alike at first
    ended_scores = torch.full_like(scores, -torch.inf)
    beam, opened = torch.arange(beams, device=device), torch.arange(batch, device=device)
    while len(opened) and decoding.position < decoding.capacity:
        rows = (opened[:, None] * beams + beam).flatten()
        logits = decoding.step(said.view(decoding.rows, -1)[rows, decoding.position], rows)
        length = decoding.position  # of what is said, without the start
        likely = logits.float().log_softmax(1).view(len(opened), beams, -1)
        likely = (likely + scores[opened, :, None]).flatten(1)
        top, place = likely.topk(2 * beams)  # half of them may end, and as many must go on
        origin, token = place // logits.shape[1], place % logits.shape[1]
        longer = said[opened[:, None], origin]
        longer[:, :, length] = token
        ends = token == config.eos_token_id
        if length == decoding.capacity:
            ends.fill_(True)

        ending = top[:, :beams].masked_fill(~ends[:, :beams], -torch.inf) / length**length_penalty
        all_scores = torch.cat([ended_scores[opened], ending], 1)
        best, which = all_scores.topk(beams)
        ended_scores[opened] = best
        every = torch.cat([ended[opened], longer[:, :beams]], 1)
        ended[opened] = every.gather(1, which[:, :, None].expand(-1, -1, every.shape[2]))

        going, which = top.masked_fill(ends, -torch.inf).topk(beams)
        scores[opened] = going
        said[opened] = longer.gather(1, which[:, :, None].expand(-1, -1, longer.shape[2]))
        sources = opened[:, None] * beams + origin.gather(1, which)
        decoding.reorder(rows, sources.flatten())
        opened = opened[going[:, 0] / length**length_penalty > best[:, -1]]
    best = ended[:, 0]
    padding = (best[:, 1:] == config.pad_token_id).flip(1).long().cumprod(1).sum(1)
    return best[:, : best.shape[1] - int(padding.min()) if batch else 1]
