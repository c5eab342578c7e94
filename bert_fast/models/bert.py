"""BERT (Devlin et al. 2019), thin: modules hold weights and say the maths; kernels are in ops.

Between the embeddings and the output every tensor is packed, (total_tokens, ...): real tokens
alone, and ``cu_seqlens`` to tell the sequences apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bert_fast import ops
from bert_fast.models.blocks import (
    GELU_APPROXIMATE,
    Linear,
    as_autocast_gives,
    attention_precision,
    check_ids,
    exportable,
    feed_forward,
    initialiser,
    prepack,
    project_add_norm,
    two,
)
from bert_fast.models.checkpoint import load, save
from bert_fast.models.config import BertConfig
from bert_fast.models.float8 import Float8Layers
from bert_fast.models.inference import Served, for_inference
from bert_fast.models.one_call import OneCall
from bert_fast.models.packing import Packing
from bert_fast.models.repeat import Layers, describer
from bert_fast.models.workspace import NoWorkspace, Workspace, can_reuse_memory


@exportable
class BertOutput(NamedTuple):
    """last_hidden_state (batch, seqlen, hidden), or (total_tokens, hidden) for packed input;
    pooler_output (batch, hidden); hidden_states: the embeddings' and each layer's, on request."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None
    hidden_states: tuple[Tensor, ...] | None = None


class Attention(nn.Module):
    causal = False

    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = hidden // self.num_heads
        self.dropout_p = config.attention_probs_dropout_prob
        self.hidden_dropout_p = config.hidden_dropout_prob
        self.qkv = Linear(hidden, 3 * hidden)
        self.out = Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)

    def forward(self, x, packing, workspace):
        (tokens, hidden), take, parts = x.shape, workspace.take, self._modules
        projected = parts["qkv"], take("qkv", tokens, 3 * hidden, x)
        qkv, bias = projected[0].project(x, projected[1], workspace)
        context, dropout_p = take("hidden", tokens, hidden, x), self.dropout_p * self.training
        context = ops.attention_qkv(
            qkv.view(tokens, 3, self.num_heads, self.head_dim), packing.cu_seqlens,
            max_seqlen=packing.max_seqlen,
            bias=None if bias is None else bias.view(3, self.num_heads, self.head_dim),
            causal=self.causal, dropout_p=dropout_p, padded_tail=packing.padded_tail,
            out=None if context is None else context.view(tokens, self.num_heads, self.head_dim),
            precision=attention_precision(x, [projected], dropout_p),
        ).view(tokens, hidden)  # fmt: skip
        dropout_p = self.hidden_dropout_p * self.training
        return project_add_norm(context, parts["out"], parts["norm"], x, dropout_p, workspace)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.approximate = GELU_APPROXIMATE[config.hidden_act]
        self.hidden_dropout_p = config.hidden_dropout_prob
        self.up = Linear(config.hidden_size, config.intermediate_size)
        self.down = Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x, workspace):
        parts, dropout_p = self._modules, self.hidden_dropout_p * self.training
        return feed_forward(
            x, parts["up"], parts["down"], parts["norm"], self.approximate, dropout_p, workspace
        )


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x, packing, workspace):
        parts = self._modules  # as attributes they take the host ten times as long
        return parts["feed_forward"](parts["attention"](x, packing, workspace), workspace)


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, pad = config.hidden_size, config.pad_token_id
        self.word = nn.Embedding(config.vocab_size, hidden, padding_idx=pad)
        self.position = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type = nn.Embedding(config.type_vocab_size, hidden)
        self.norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, position_ids, token_type_ids):
        """Packed ids (total_tokens,); token_type_ids None means all 0."""
        parts = self._modules
        word, norm = parts["word"], parts["norm"]
        x = ops.embedding_layer_norm(
            input_ids, position_ids, token_type_ids, word.weight, parts["position"].weight,
            parts["token_type"].weight, *two(norm), eps=norm.eps, padding_idx=word.padding_idx,
        )  # fmt: skip
        return parts["dropout"](x)


class BertModel(nn.Module):
    """BERT's encoder and pooler; Hugging Face's ``BertModel`` in results, not in code."""

    _describe = staticmethod(describer(Layer, Attention, FeedForward))
    gradient_checkpointing = False  # in training: keep each layer's input alone, compute it again

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.pooler = Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.workspace = Workspace()
        self.one_call = OneCall(Embeddings)
        self.served_in: str | None = None  # the precision that for_inference gave it
        self.apply(initialiser(config))

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, dtype: torch.dtype | str | None = None,
        *, add_pooling_layer: bool = True, **options: Any,
    ) -> BertModel:  # fmt: skip
        """A Hugging Face BERT checkpoint: config.json and model.safetensors (or
        pytorch_model.bin, read without unpickling code).

        Args:
            directory: the checkpoint's, or its name on the Hugging Face Hub.
            dtype (or ``torch_dtype``): "auto" is the checkpoint's, and the default, but for
                float16: that is computed in float32 unless asked for.
            add_pooling_layer: whether to keep the pooler, where the checkpoint has one.
            options: those of transformers. ``revision``, ``cache_dir``, ``local_files_only``,
                ``force_download``, ``token``, ``subfolder``, as of
                :func:`bert_fast.models.hub.resolve`; ``device_map``, of one device; ``config``;
                ``variant`` and ``use_safetensors``, of the weights' file; changes to the config:
                fewer ``num_hidden_layers`` are the first ones, with a warning. What only says how
                transformers loads and computes (``low_cpu_mem_usage``, ``attn_implementation``,
                ...) changes nothing.

        Raises:
            CheckpointError: naming the file, and the keys that are missing or misshapen, or what it
                asks for that is not supported; or an argument that does not fit the model.
            ValueError: naming an argument that is not supported.
        """

        def make(config, state):
            has_pooler = add_pooling_layer and any("pooler." in key for key in state)
            with torch.device("meta"):  # no memory, no initialisation: all is about to be set
                return cls(config, add_pooling_layer=has_pooler)

        return load(make, directory, dtype=dtype, **options)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes what Hugging Face's ``BertModel.from_pretrained`` loads."""
        save(self, directory)

    def prepack(self) -> BertModel:
        """Lays the weights out for inference in float32 on the CPU, once; returns the model.

        The linear layers then spend no time on copying their weights, which for a few tokens is
        most of it; on processors with AMX (Intel Xeon since 2023) they run on that unit, in fp32
        by three bf16 parts, at no loss of accuracy (fewer than 32 tokens by AVX-512). It takes as
        much memory again as the linear weights do; 2.5 times as much with AMX. A weight that
        PyTorch sees changing (an optimizer, load_state_dict) is packed anew by the next call; what
        is written through ``.data`` it sees by sixteen numbers of each weight.
        """
        return prepack(self)

    def for_inference(
        self, dtype: Served | torch.dtype = "float32",
        calibration: Iterable[dict[str, Tensor]] | None = None,
    ) -> BertModel:  # fmt: skip
        """Replaces the layers' weights by ones laid out for inference on the CPU, or in float8 on
        a GPU; returns the model, which can then neither be trained nor moved.

        What is no product of an encoder layer stays in float32 (beside float8: in bfloat16).
        The layers' weights take as much memory as they did in float32 (2.5 times as much with AMX),
        half in bfloat16 and a quarter in int8; the embeddings are as they were.

        Args:
            dtype: "float32"; "bfloat16" products; or "int8" ones, by token and channel, without
                those that lose too much (left in bfloat16, or float32 where that is faster), with
                attention's own two in bfloat16. "float8", experimental: in e4m3, by token and
                channel, of a bfloat16 model on a GPU of compute capability 8.9 or later; it cannot
                be saved. Its numbers are tested on a CPU alone, and no speed is claimed.
            calibration: for int8: inputs, as keyword arguments of :meth:`encode`. Default: 32
                sequences of 32 drawn tokens.

        Raises:
            ValueError: the model is not in float32 on the CPU (float8: what does not fit), or has
                weights that are not finite and would be rounded; calibration has no tokens, or
                ``dtype`` needs none.
        """
        return for_inference(self, dtype, calibration)

    def _apply(self, fn, *args, **kwargs):
        if self.served_in is not None:  # before anything of it has changed
            kept = self.embeddings.word.weight
            changed = fn(kept.new_empty(0))
            if changed.device != kept.device or changed.dtype != kept.dtype:
                where = "the CPU" if kept.device.type == "cpu" else kept.device
                raise RuntimeError(
                    f"for_inference() has packed this model for {where}: it cannot become "
                    f"{changed.dtype} on {changed.device}; load it anew"
                )
        self.one_call.forget()  # of weights that may go
        return super()._apply(fn, *args, **kwargs)

    def _load_from_state_dict(self, *args):
        if self.served_in is not None:  # before anything of it has changed
            raise RuntimeError("for_inference() has replaced this model's weights: load it anew")
        super()._load_from_state_dict(*args)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, *,
        cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
        capacity: int | None = None, output_hidden_states: bool | None = None,
    ) -> BertOutput:  # fmt: skip
        """What Hugging Face's BertModel computes, at the real tokens; zeros at the others.

        Args:
            input_ids: (batch, seqlen); or packed, (total_tokens,), with ``cu_seqlens``.
            attention_mask: (batch, seqlen), ones for real tokens and zeros in any pattern.
                Padding is dropped. Of a mask on a GPU the number of real tokens is waited for; not
                with ``capacity``, nor while a CUDA graph is captured or torch.compile traces.
            token_type_ids, position_ids: like input_ids; default 0, and the column (packed: the
                position in the sequence).
            cu_seqlens, max_seqlen: of packed input; see :func:`bert_fast.attention`.
            capacity: rows of the packed buffer, fixed: shapes then depend on nothing in the mask,
                whose values and count are checked on the CPU alone, or by an assertion on the GPU.
            output_hidden_states: also return the embeddings' output and every layer's; default
                what the config says.

        The pooler reads each sequence's first real token; one without any gives zeros.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states, packing = self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen, capacity=capacity, output_hidden_states=output_hidden_states,
        )  # fmt: skip
        pooled = self._pool(states[-1], packing)
        with self.one_call.around(states[-1].numel(), copies=True):
            hidden_states = states if cu_seqlens is not None else list(map(packing.unpack, states))
            if torch.is_autocast_enabled(states[-1].device.type):
                weight = self.embeddings.norm.weight
                hidden_states = [as_autocast_gives(h, weight) for h in hidden_states]
        return BertOutput(
            hidden_states[-1], pooled, tuple(hidden_states) if output_hidden_states else None
        )

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, *,
        cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
        capacity: int | None = None, output_hidden_states: bool = False,
    ) -> tuple[list[Tensor], Packing]:  # fmt: skip
        """:meth:`forward` before the padding is put back: hidden states, (total_tokens, hidden), a
        list of the last alone or of all; and their :class:`~bert_fast.models.packing.Packing`."""
        run = self._encode
        if self.served_in is not None:
            run = self._uncompiled() if torch.compiler.is_compiling() else self._encode_served
        inputs = input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen
        return run((*inputs, capacity), output_hidden_states)

    def _uncompiled(self):  # no decorator: that imports all of torch._dynamo
        return torch.compiler.disable(self._encode_served)

    def _encode_served(self, *args):
        if not torch.is_grad_enabled() and not torch._C._is_any_autocast_enabled():
            return self._encode(*args)  # without contexts, each as long as an op
        device = self.embeddings.word.weight.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return self._encode(*args)

    def _encode(self, inputs, output_hidden_states):
        last_alone = not (output_hidden_states or Attention.causal)
        if last_alone and (found := self.one_call.from_ids(self, *inputs)):
            return found
        tokens = inputs[0].numel() if isinstance(inputs[0], Tensor) else 0
        with self.one_call.around(tokens * self.config.hidden_size):
            x, packing = self._embed(*inputs)
        workspace = self.workspace if can_reuse_memory(x) else NoWorkspace()
        given, reuses = (self.layers, x, packing, workspace), workspace is self.workspace
        if last_alone and reuses and (out := self.one_call(*given, self._describe)) is not None:
            return [out], packing
        kind = Float8Layers if self.served_in == "float8" else Layers
        states, run = [], kind(self._describe, self.layers, x, packing)
        for layer in self.layers:
            if output_hidden_states:
                states.append(x.clone())  # inference goes on in x's own memory
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, packing, workspace, use_reentrant=False)
            else:
                x = run(layer, x, packing, workspace)
        return [*states, x], packing

    def _embed(
        self, input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen,
        capacity,
    ):  # fmt: skip
        """The embeddings of the real tokens, (total_tokens, hidden), and their packing."""
        check_ids("input_ids", input_ids, self.config.vocab_size)
        check_ids("token_type_ids", token_type_ids, self.config.type_vocab_size, input_ids)
        check_ids("position_ids", position_ids, self.config.max_position_embeddings, input_ids)
        packing = self._packing(input_ids, attention_mask, cu_seqlens, max_seqlen, capacity)
        if cu_seqlens is not None:
            if position_ids is None:
                _, position_ids = ops.reference.sequence_of_token(cu_seqlens, input_ids.shape[0])
                self.check_length(packing.max_seqlen if ops.is_concrete(cu_seqlens) else 0)
        else:
            if position_ids is None:
                self.check_length(input_ids.shape[1])
                position_ids = packing.positions()
            else:
                position_ids = packing.pack(position_ids.expand_as(input_ids))
            input_ids = packing.pack(input_ids)
            if token_type_ids is not None:
                token_type_ids = packing.pack(token_type_ids)
        return self.embeddings(input_ids, position_ids, token_type_ids), packing

    def _packing(self, input_ids, attention_mask, cu_seqlens, max_seqlen, capacity):
        if cu_seqlens is not None:
            if input_ids.ndim != 1 or attention_mask is not None or capacity is not None:
                raise ValueError(
                    "cu_seqlens is for packed input: input_ids must be (total_tokens,), "
                    "attention_mask and capacity None"
                )
            tokens, device = input_ids.shape[0], input_ids.device
            max_seqlen = ops.check_cu_seqlens(
                "cu_seqlens", cu_seqlens, tokens, device, max_seqlen, False
            )
            return Packing(cu_seqlens, max_seqlen, None, 1, tokens)
        if input_ids.ndim != 2:
            raise ValueError(
                f"input_ids must be (batch, seqlen), not {tuple(input_ids.shape)}; "
                "packed input needs cu_seqlens"
            )
        if attention_mask is None:
            if capacity is not None:
                raise ValueError("capacity needs an attention_mask")
            return Packing.of_full(*input_ids.shape, input_ids.device)
        if not isinstance(attention_mask, Tensor):
            raise TypeError("attention_mask must be a tensor")
        packing = Packing.of_mask(attention_mask, capacity)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have input_ids' shape {tuple(input_ids.shape)}, "
                f"not {tuple(attention_mask.shape)}"
            )
        return packing.to(input_ids.device)

    def check_length(self, longest):
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids hold a sequence of {longest} tokens; the model has "
                f"{self.config.max_position_embeddings} positions"
            )

    def _pool(self, x, packing):
        pooler = self.pooler
        if pooler is None:
            return None
        with self.one_call.around(x.numel()):
            if (product := self.one_call.of_first(pooler, x, packing)) is not None:
                return product.tanh_()
            return packing.of_first(x, lambda first: torch.tanh(pooler(first)))
