"""What is measured. A work draws its inputs, knows its definition, and what it costs at the least.

``results(run)`` of any contestant is a list of packed tensors (real tokens alone) that can be
compared with ``truth()``, the eager definition in float64 (in float32 for 16-bit dtypes, as
FlashAttention's tests have it), and with ``allowed()``, the same in the work's own dtype, whose
error is PyTorch's own.
"""

import copy
import functools
import itertools
import math
import tempfile
from dataclasses import dataclass, field

import torch

import bert_fast
from bert_fast.bench.peers.ours import Eager

OPS = ("attention", "layer_norm", "gelu", "linear_gelu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "int8": torch.int8}  # fmt: skip
LOW = (torch.bfloat16, torch.int8)  # of whole models: what is compared with float32 by cosines
CALIBRATION = 64  # drawn texts: more say no more
MODELS = {  # the shapes; weights are drawn, because no time depends on them
    "minilm-l6": dict(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    ),
    "bert-base": {},
    "bert-large": dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
}


@dataclass
class Work:
    """Common to all. ``kind`` names the method of a peer that does it."""

    dtype: torch.dtype
    device: str = "cpu"
    backward: bool = False
    seed: int = 0

    kind = ""
    pause = 0.0  # seconds between contestants, where other engines' threads may still spin
    graphs = True
    ratio = 2  # the allowance, as a multiple of PyTorch's own error; gradients get 3
    tokens = None  # for tokens/s

    def __str__(self):
        direction = ", backward" if self.backward else ""
        return f"{self.title}{direction}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def compute(self):
        """What it is computed in: the work's dtype, but for the truth."""
        return self.__dict__.get("_compute", self.dtype)

    def generator(self, number, device=None):
        """Draws where the tensors are to be: from the CPU they would take longer than the work."""
        return torch.Generator(device or self.device).manual_seed(self.seed * 1000 + number)

    def randn(self, *shape, generator):
        """Normal numbers of the work's dtype, in the one it is computed in."""
        drawn = torch.randn(*shape, generator=generator, device=self.device)
        return drawn.to(self.dtype).to(self.compute)

    def in_dtype(self, dtype):
        """The same work in another dtype."""
        work = copy.copy(self)
        work.dtype = dtype
        return work

    def truth(self):
        return self._eager(torch.float64 if self.dtype == torch.float32 else torch.float32)

    def allowed(self):
        """PyTorch's own in the work's dtype; None in int8, where PyTorch has no such model."""
        return None if self.dtype == torch.int8 else self._eager(self.dtype)

    def _eager(self, dtype):
        """The definition, on copy 0 of the inputs."""
        work = copy.copy(self)
        work._compute = dtype
        return getattr(Eager(), self.kind)(work, work.inputs(0)).results(self.backward)


@dataclass
class Attention(Work):
    """softmax(QKᵀ/√d)V of packed sequences, from one fused projection."""

    lengths: tuple = (128,) * 8
    num_heads: int = 12
    head_dim: int = 64
    causal: bool = False
    dropout_p: float = 0.0

    kind = "attention"

    @property
    def title(self):
        options = ", causal" * self.causal + f", dropout {self.dropout_p}" * (self.dropout_p > 0)
        return (f"attention, {describe(self.lengths)}, {self.num_heads} heads of "
                f"{self.head_dim}{options}")  # fmt: skip

    @functools.cached_property
    def cu_seqlens(self):
        ends = list(itertools.accumulate(self.lengths))
        return torch.tensor([0, *ends], dtype=torch.int32, device=self.device)

    @property
    def tokens(self):
        return sum(self.lengths)

    @property
    def max_seqlen(self):
        return max(self.lengths)

    def inputs(self, number):
        generator = self.generator(number)
        shape = self.tokens, 3, self.num_heads, self.head_dim
        qkv = self.randn(*shape, generator=generator)
        dout = self.randn(shape[0], *shape[2:], generator=generator)
        return qkv.requires_grad_(self.backward), dout

    @property
    def flops(self):
        """Two products forward, five backward (FlashAttention's count); half if causal."""
        products = 5 if self.backward else 2
        pairs = sum(n * n for n in self.lengths) * self.num_heads * self.head_dim
        return 2 * products * pairs // (2 if self.causal else 1)

    @property
    def num_bytes(self):
        """Forward q, k, v, out; backward these, dout and the three gradients: once each."""
        tensors = 8 if self.backward else 4
        return tensors * self.tokens * self.num_heads * self.head_dim * self.dtype.itemsize


@dataclass
class LayerNorm(Work):
    """LN(x + linear_bias + residual): BERT's, after either linear layer."""

    rows: int = 1024
    width: int = 768

    kind = "layer_norm"
    flops = 0

    @property
    def title(self):
        return f"bias + residual + layer-norm, {self.rows} x {self.width}"

    def inputs(self, number):
        """x, residual, weight, bias, linear_bias, dout"""
        draw = functools.partial(self.randn, generator=self.generator(number))
        x, residual, dout = (draw(self.rows, self.width) for _ in range(3))
        leaves = x, residual, *(draw(self.width) for _ in range(3))
        return *(t.requires_grad_(self.backward) for t in leaves), dout

    @property
    def num_bytes(self):
        """Forward x, residual, out; backward dout, the normalised sum, dx."""
        return 3 * self.rows * self.width * self.dtype.itemsize


@dataclass
class Gelu(Work):
    """GELU(x + bias), exact."""

    rows: int = 1024
    width: int = 3072

    kind = "gelu"
    flops = 0

    @property
    def title(self):
        return f"bias + gelu, {self.rows} x {self.width}"

    def inputs(self, number):
        """x, bias, dout"""
        draw = functools.partial(self.randn, generator=self.generator(number))
        x, dout, bias = draw(self.rows, self.width), draw(self.rows, self.width), draw(self.width)
        return x.requires_grad_(self.backward), bias.requires_grad_(self.backward), dout

    @property
    def num_bytes(self):
        return (3 if self.backward else 2) * self.rows * self.width * self.dtype.itemsize


@dataclass
class LinearGelu(Work):
    """GELU(x Wᵀ + bias): the first half of BERT's feed-forward."""

    rows: int = 1024
    width: int = 768
    out_width: int = 3072

    kind = "linear_gelu"

    @property
    def title(self):
        return f"linear + gelu, {self.rows} x {self.width} x {self.out_width}"

    def inputs(self, number):
        """x, weight, bias, dout"""
        draw = functools.partial(self.randn, generator=self.generator(number))
        x, dout = draw(self.rows, self.width), draw(self.rows, self.out_width)
        weight = draw(self.out_width, self.width) / math.sqrt(self.width)
        leaves = x, weight, draw(self.out_width)
        return *(t.requires_grad_(self.backward) for t in leaves), dout

    @property
    def flops(self):
        return (4 if self.backward else 2) * self.rows * self.width * self.out_width

    @property
    def num_bytes(self):
        """x, the weight and the output, once; backward the gradients too."""
        elements = self.rows * (self.width + self.out_width) + self.width * self.out_width
        return (2 if self.backward else 1) * elements * self.dtype.itemsize


@dataclass
class Model(Work):
    """A whole BERT, or ``layers`` of its encoder alone, over one or several batches in a row."""

    name: str = "minilm-l6"
    batches: tuple = ((128,) * 8,)  # of lengths
    directory: str | None = None  # a checkpoint instead of the drawn weights of ``name``
    config_changes: dict = field(default_factory=dict)

    kind = "model"
    pause = 0.05
    graphs = False
    ratio = 3
    num_bytes = 0  # weights are read once a call; on every chip the products cost more

    @property
    def title(self):
        lengths = [n for batch in self.batches for n in batch]
        times = f"{len(self.batches)} batches of " if len(self.batches) > 1 else ""
        sizes = f"{times}{len(self.batches[0])} x {max(lengths)}, {self.share:.0%} real"
        return f"{self.name}, {sizes}"

    @property
    def share(self):
        padded = sum(len(batch) * max(batch) for batch in self.batches)
        return self.tokens / padded

    @property
    def tokens(self):
        return sum(map(sum, self.batches))

    @functools.cached_property
    def checkpoint(self):
        """A directory that Hugging Face and we load; drawn weights live as long as the work."""
        if self.directory:
            return self.directory
        self._scratch = tempfile.TemporaryDirectory(prefix="bert_fast-bench-")
        generator_state = torch.get_rng_state()
        torch.manual_seed(self.seed)
        values = {**MODELS[self.name], **self.config_changes}
        positions = max(512, *(max(batch) for batch in self.batches))
        config = bert_fast.BertConfig(**{"max_position_embeddings": positions, **values})
        if self.dtype in LOW:  # BERT's 0.02 leaves a layer so little that none would be missed
            config.initializer_range = config.hidden_size**-0.5
        bert_fast.BertModel(config).save_pretrained(self._scratch.name)
        torch.set_rng_state(generator_state)
        return self._scratch.name

    def in_dtype(self, dtype):
        """The same checkpoint, too."""
        checkpoint, work = self.checkpoint, super().in_dtype(dtype)
        work.__dict__["checkpoint"] = checkpoint
        return work

    @functools.cached_property
    def config(self):
        return bert_fast.BertConfig.from_json(f"{self.checkpoint}/config.json")

    def inputs(self, number):
        return self.padded_batches

    @functools.cached_property
    def padded_batches(self):
        """What a tokenizer gives: padded ids and mask a batch."""
        return self._drawn(self.batches, 0)

    @functools.cached_property
    def calibration(self):
        """Batches like these, of other ids: what activations' scales are made from."""
        most = [batch[: max(1, CALIBRATION // len(self.batches))] for batch in self.batches]
        times = max(1, min(20, CALIBRATION // sum(map(len, most))))
        return [batch for i in range(times) for batch in self._drawn(most, 1 + i)]

    def _drawn(self, batches, number):
        generator, made = self.generator(number, "cpu"), []
        for lengths in batches:
            lengths, seqlen = torch.tensor(lengths), max(lengths)
            mask = (torch.arange(seqlen) < lengths[:, None]).long()
            low, high = min(1000, self.config.vocab_size // 2), self.config.vocab_size
            ids = torch.randint(low, high, mask.shape, generator=generator) * mask
            made.append({"input_ids": ids, "attention_mask": mask})
        return made

    @property
    def flops(self):
        """The products of every layer on real tokens, and attention's."""
        hidden, wide = self.config.hidden_size, self.config.intermediate_size
        linear = self.tokens * (4 * hidden * hidden + 2 * hidden * wide)
        pairs = sum(n * n for batch in self.batches for n in batch) * hidden
        return (
            self.config.num_hidden_layers * (2 * linear + 4 * pairs) * (3 if self.backward else 1)
        )


@dataclass
class Layer(Model):
    """One encoder layer: hidden states of one batch in, hidden states out."""

    kind = "layer"
    pause = 0.0
    graphs = True

    def __post_init__(self):
        self.config_changes = {**self.config_changes, "num_hidden_layers": 1}

    @property
    def title(self):
        return f"layer of {super().title}"

    @property
    def lengths(self):
        return self.batches[0]

    @functools.cached_property
    def mask(self):
        lengths = torch.tensor(self.lengths)
        return (torch.arange(max(self.lengths)) < lengths[:, None]).to(self.device)

    def inputs(self, number):
        """Padded hidden states and the output's gradient, zero at padding."""
        generator, mask = self.generator(number), self.mask[..., None]
        shape = *self.mask.shape, self.config.hidden_size
        x, dout = (self.randn(*shape, generator=generator) * mask for _ in range(2))
        return x.requires_grad_(self.backward), dout


@dataclass
class Train(Model):
    """A training step: zero_grad, forward, backward, AdamW. Dropout is the checkpoint's while it
    is timed and off while gradients are compared."""

    backward: bool = True

    kind = "train"

    @property
    def title(self):
        return f"training step, {super().title}"

    def __str__(self):
        return f"{self.title}, {str(self.dtype).removeprefix('torch.')}"

    @functools.cached_property
    def targets(self):
        """The gradient of each batch's output: the loss is their sum of products."""
        generator, width = self.generator(1), self.config.hidden_size
        masks = [batch["attention_mask"].to(self.device) for batch in self.padded_batches]
        options = dict(generator=generator, device=self.device)
        return [torch.randn(*mask.shape, width, **options) * mask[..., None] for mask in masks]


def describe(lengths):
    """A batch's lengths in words: how many, and from where to where."""
    low, high = min(lengths), max(lengths)
    return f"{len(lengths)} x {high}" if low == high else f"{len(lengths)} x {low} to {high}"
