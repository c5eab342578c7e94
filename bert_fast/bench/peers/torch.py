"""PyTorch's own ways: functions, torch.compile, SDPA, its encoder layer."""

import contextlib
import functools

import torch
import torch.nn.functional as F

import bert_fast
from bert_fast.bench.contestant import Run
from bert_fast.bench.peers.hugging_face import HuggingFace
from bert_fast.bench.peers.layouts import heads_run, packer, padded_heads
from bert_fast.bench.peers.peer import Absent, Peer
from bert_fast.ops import reference


class Torch(Peer):
    """PyTorch's own functions, an op after the other."""

    name = "torch.nn.functional"

    def wrap(self, function):
        return function

    def layer_norm(self, work, inputs):
        *leaves, dout = inputs

        def function(x, residual, weight, bias, linear_bias):
            return F.layer_norm(x + linear_bias + residual, weight.shape, weight, bias, 1e-12)

        norm = self.wrap(function)
        return Run(lambda: norm(*leaves), leaves=tuple(leaves), dout=dout)

    def gelu(self, work, inputs):
        x, bias, dout = inputs
        gelu = self.wrap(lambda x, bias: F.gelu(x + bias))
        return Run(lambda: gelu(x, bias), leaves=(x, bias), dout=dout)

    def linear_gelu(self, work, inputs):
        *leaves, dout = inputs
        function = self.wrap(lambda *t: F.gelu(F.linear(*t)))
        return Run(lambda: function(*leaves), leaves=tuple(leaves), dout=dout)


class Compiled(Torch):
    """torch.compile of the same, of the reference's attention, and of Hugging Face's model."""

    slow_to_make = True

    def __init__(self, mode):
        self.name, self.mode = f"torch.compile {mode}", mode
        if mode == "reduce-overhead":  # by CUDA graphs
            self.devices = ("cuda",)

    def why_absent(self, work):  # asked once a work
        self.compiled = {}
        return super().why_absent(work)

    def wrap(self, function):
        """Compiled once a work: all copies of its inputs have the same shapes."""
        import torch._functorch.config

        code = getattr(function, "__code__", function)
        if code not in self.compiled:
            if not self.compiled:
                torch._dynamo.reset()
            torch._functorch.config.donated_buffer = False  # backward runs more than once
            self.compiled[code] = torch.compile(function, mode=self.mode)
        return self.compiled[code]

    def attention(self, work, inputs):
        (qkv, dout), cu, longest = inputs, work.cu_seqlens, work.max_seqlen
        attention = self.wrap(reference.attention)
        forward = lambda: attention(  # noqa: E731
            *qkv.unbind(1), cu, cu, longest, longest, None, work.head_dim**-0.5, work.causal, 0.0,
            None,
        )  # fmt: skip
        return Run(lambda: forward()[0], leaves=(qkv,), dout=dout)

    def layer(self, work, inputs):
        return HuggingFace("sdpa").layer(work, inputs, self.wrap)

    def model(self, work, inputs):
        return HuggingFace("sdpa").model(work, inputs, self.wrap)

    def train(self, work, inputs):
        return HuggingFace("sdpa").train(work, inputs, self.wrap)


class Sdpa(Peer):
    """scaled_dot_product_attention on the padded batch, by one of its backends or its choice."""

    def __init__(self, backend=None):
        self.backend = backend
        self.name = f"SDPA {backend.replace('_attention', '').lower()}" if backend else "SDPA"
        if backend not in (None, "MATH", "FLASH_ATTENTION"):
            self.devices = ("cuda",)

    def attention(self, work, inputs):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        leaves, dout, real = padded_heads(work, inputs)
        mask = None if bool(real.all()) else real[:, None, None]
        if work.causal and mask is not None:
            raise Absent("takes no mask of padding beside causal")
        options = dict(attn_mask=mask, is_causal=work.causal)
        chosen = self.backend and getattr(SDPBackend, self.backend)

        def forward():
            with sdpa_kernel(chosen) if chosen is not None else contextlib.nullcontext():
                return F.scaled_dot_product_attention(*leaves, **options)

        return heads_run(forward, leaves, dout, real)


class SdpaLoop(Peer):
    """scaled_dot_product_attention, one call per sequence: no padding, many launches."""

    name = "SDPA, one call per sequence"

    def attention(self, work, inputs):
        qkv, dout = inputs

        def forward():
            parts = [part.permute(1, 2, 0, 3)[:, None] for part in qkv.split(list(work.lengths))]
            outs = [F.scaled_dot_product_attention(*p, is_causal=work.causal)[0] for p in parts]
            return torch.cat([out.transpose(0, 1) for out in outs])

        return Run(forward, leaves=(qkv,), dout=dout)


class TorchEncoderLayer(Peer):
    """torch.nn.TransformerEncoderLayer, whose inference path is fused."""

    name = "torch.nn.TransformerEncoderLayer"

    def layer(self, work, inputs):
        (x, dout), config = inputs, work.config
        ours = bert_fast.BertModel.from_pretrained(work.checkpoint, work.dtype).layers[0]
        layer = torch.nn.TransformerEncoderLayer(
            config.hidden_size, config.num_attention_heads, config.intermediate_size,
            activation="gelu", layer_norm_eps=config.layer_norm_eps, batch_first=True,
            dtype=work.dtype,
        ).eval()  # fmt: skip
        attention, feed_forward = ours.attention, ours.feed_forward
        state = {
            "self_attn.in_proj_": attention.qkv, "self_attn.out_proj.": attention.out,
            "norm1.": attention.norm, "linear1.": feed_forward.up, "linear2.": feed_forward.down,
            "norm2.": feed_forward.norm,
        }  # fmt: skip
        layer.load_state_dict(
            {f"{a}{b}": getattr(m, b) for a, m in state.items() for b in ("weight", "bias")}
        )
        layer.to(work.device)
        padding = None if bool(work.mask.all()) else ~work.mask
        forward = functools.partial(layer, x, src_key_padding_mask=padding)
        return Run(forward, packer(work.mask), (x,), dout)
