"""A BERT that writes: causal self-attention, and attention to what an encoder has read, on packed
tokens."""

import torch
from torch import nn

from bert_fast import ops
from bert_fast.models.bert import Attention, Embeddings, FeedForward
from bert_fast.models.blocks import Linear, initialiser, project_add_norm
from bert_fast.models.heads import PreTrainingHeads
from bert_fast.models.workspace import NoWorkspace, Workspace, can_reuse_memory


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
        return self.cls.predictions(hidden, self.cls.predictions.weight(self.bert.embeddings))

    def loss(self, hidden, labels):
        weight = self.cls.predictions.weight(self.bert.embeddings)
        return self.cls.predictions.loss(hidden, weight, labels)[0]
