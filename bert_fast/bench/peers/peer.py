"""Who is measured. A peer is a class with a method for each kind of work it does; the method takes
the work and one copy of its inputs, and returns a :class:`~bert_fast.bench.works.Run` in whatever
layout suits the peer. A new peer or kernel variant: a class here, and a line in :func:`peers`.
"""

import contextlib
import functools
import importlib.util
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import bert_fast
from bert_fast import backends, ops
from bert_fast.bench.works import Run
from bert_fast.models.bert import Linear
from bert_fast.models.workspace import NoWorkspace, Workspace
from bert_fast.ops import reference


class Absent(Exception):
    """Why a peer does not do a work."""


def _unwrapped(model):
    return model


class Peer:
    name = ""
    package = None  # what must be installed
    devices = ("cpu", "cuda")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    inference = False  # whether it has no backward
    same_masks = False  # whether its dropout drops what the definition's does
    slow_to_make = False  # then it is made once, and not anew for each block of rounds
    ceiling = False  # a bound of the machine's, not a contestant: nothing to check

    def why_absent(self, work):
        """None, or the reason why it cannot do the work here."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        if work.device not in self.devices:
            return f"runs on {' and '.join(self.devices)} alone"
        if work.dtype not in self.dtypes:
            known = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"is set up for {known} alone"
        if work.backward and self.inference:
            return "has no backward"
        if getattr(work, "dropout_p", 0) and not (self.same_masks or self.ceiling):
            return "draws other dropout masks: its result cannot be checked"
        return None


# ------------------------------------------------------------------------------------------------
# Layouts
# ------------------------------------------------------------------------------------------------


def pad(work, packed):
    """(total, ...) -> (batch, longest, ...), zeros after each sequence's end."""
    parts = packed.split(list(work.lengths))
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def packer(mask):
    """Padded -> packed, by a mask of real tokens."""
    return lambda padded: padded[mask.to(padded.device)]


def padded_heads(work, inputs):
    """q, k, v as leaves (batch, heads, longest, head_dim), dout alike, and the mask (None where all
    tokens are real)."""
    qkv, dout = inputs
    leaves = [
        pad(work, t).transpose(1, 2).contiguous().requires_grad_(work.backward)
        for t in qkv.detach().unbind(1)
    ]
    lengths = torch.tensor(work.lengths, device=qkv.device)
    mask = torch.arange(work.max_seqlen, device=qkv.device) < lengths[:, None]
    return leaves, pad(work, dout).transpose(1, 2).contiguous(), mask


def heads_run(forward, leaves, dout, mask):
    """A Run whose tensors are (batch, heads, longest, head_dim)."""

    def packed(t):
        return t.transpose(1, 2)[mask]

    def gradient(grads):
        return [torch.stack([packed(g) for g in grads], dim=1)]

    return Run(forward, packed, leaves, dout, gradient)


# ------------------------------------------------------------------------------------------------
# bert_fast
# ------------------------------------------------------------------------------------------------


class Ours(Peer):
    """Our ops and model on one backend. In inference they write into memory that is there already,
    as the model has them do."""

    same_masks = True

    def __init__(self, backend="auto", prepack=True, name="bert_fast"):
        self.backend, self.prepack, self.name = backend, prepack, name

    def _check(self, op, work):
        with self._use():
            found = backends.choose(op, work.device, work.dtype, work.backward)
        if found == "eager" != self.backend:
            raise Absent(f"no kernel of ours does {op} here")

    def _use(self):
        if self.backend == "auto":
            return contextlib.nullcontext()
        return backends.use_backend(self.backend)

    def _out(self, work, like):
        return None if work.backward or self.backend == "eager" else torch.empty_like(like)

    def attention(self, work, inputs):
        self._check("attention", work)
        (qkv, dout), cu = inputs, work.cu_seqlens
        out = self._out(work, dout)
        options = dict(max_seqlen=work.max_seqlen, causal=work.causal, dropout_p=work.dropout_p,
                       seed=torch.tensor([1], device=qkv.device), backend=self.backend)  # fmt: skip
        return Run(lambda: ops.attention_qkv(qkv, cu, out=out, **options), leaves=(qkv,), dout=dout)

    def layer_norm(self, work, inputs):
        self._check("layer_norm", work)
        x, residual, weight, bias, linear_bias, dout = inputs
        out = self._out(work, x)
        return Run(
            lambda: ops.layer_norm(
                x, weight, bias, residual=residual, linear_bias=linear_bias, out=out,
                backend=self.backend,
            ),
            leaves=inputs[:-1], dout=dout,
        )  # fmt: skip

    def gelu(self, work, inputs):
        self._check("gelu", work)
        x, bias, dout = inputs
        out = self._out(work, x)
        return Run(
            lambda: ops.gelu(x, bias, out=out, backend=self.backend), leaves=(x, bias), dout=dout
        )

    def linear_gelu(self, work, inputs):
        self._check("gelu", work)
        x, weight, bias, dout = inputs
        linear = Linear(work.width, work.out_width, device="meta")
        linear.weight, linear.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        leaves = (x, linear.weight, linear.bias) if work.backward else ()
        workspace = NoWorkspace() if work.backward else Workspace()
        if self.prepack and not work.backward:
            linear.packed = ops.pack_weight(linear.weight)
        out = self._out(work, dout) if work.device == "cpu" else None

        def forward():
            with self._use():
                return linear.gelu(x, "none", out, workspace)

        return Run(forward, leaves=leaves, dout=dout)

    def load(self, work):
        model = bert_fast.BertModel.from_pretrained(work.checkpoint, work.compute).to(work.device)
        return model.prepack() if self.prepack and not work.backward else model

    def layer(self, work, inputs):
        self._check("attention", work)
        (x, dout), mask = inputs, work.mask
        model = self.load(work)
        packing = bert_fast.models.packing.Packing.of_mask(mask.cpu()).to(x.device)
        packed = x.detach()[mask].requires_grad_(work.backward)
        workspace = NoWorkspace() if work.backward or x.is_cuda else model.workspace

        def forward():
            with self._use():
                # Inference ends in its input's memory: give it a copy to end in.
                x = packed if work.backward else packed.clone()
                return model.layers[0].eval()(x, packing, workspace)

        return Run(forward, leaves=(packed,), dout=dout[mask])

    def model(self, work, inputs):
        self._check("attention", work)
        model = self.load(work).eval()
        batches, packed = on_device(inputs, work.device, mask_on_cpu=True)

        def forward():
            with self._use():
                return [model(**batch).last_hidden_state for batch in batches]

        return Run(forward, packed)

    def train(self, work, inputs):
        self._check("attention", work)
        model = self.load(work)
        batches, packed = on_device(inputs, work.device, mask_on_cpu=True)

        def hidden(batch):
            with self._use():
                return model(**batch).last_hidden_state

        return Step(work, model, hidden, batches, packed, model.embeddings.word.weight)


class NotPrepacked(Ours):
    """Ours on a processor without AMX, or where ``prepack()`` was not called."""

    attention = layer_norm = gelu = train = None

    def __init__(self):
        super().__init__(prepack=False, name="bert_fast, not prepacked")

    def why_absent(self, work):
        if work.backward or work.device != "cpu" or not has_amx():
            return "nothing would be prepacked here"
        return super().why_absent(work)


def has_amx():
    return ops.pack_weight(torch.nn.Parameter(torch.zeros(32, 32))) is not None


class Eager(Ours):
    """The definition, in plain PyTorch: also what the allowance is measured by."""

    def __init__(self):
        super().__init__("eager", prepack=False, name="eager reference")

    def why_absent(self, work):
        return None

    def linear_gelu(self, work, inputs):
        x, weight, bias, dout = inputs
        forward = lambda: reference.gelu(F.linear(x, weight), bias)  # noqa: E731
        return Run(forward, leaves=inputs[:-1], dout=dout)


def on_device(batches, device, mask_on_cpu=False):
    """Batches on the device (for us the mask stays on the CPU, where a tokenizer makes it), and
    what packs a list of padded outputs."""
    moved, masks = [], []
    for batch in batches:
        mask = batch["attention_mask"]
        masks.append(mask.bool())
        mask = mask if mask_on_cpu else mask.to(device)
        moved.append({"input_ids": batch["input_ids"].to(device), "attention_mask": mask})

    def packed(outputs):
        return torch.cat([o[m.to(o.device)] for o, m in zip(outputs, masks, strict=True)])

    return moved, packed


class Step(Run):
    """A training step of a model: what is timed is all of it; what is compared, without dropout,
    is the output and the gradient of the word embeddings, which all other gradients lead to."""

    def __init__(self, work, model, hidden, batches, packed, word):
        super().__init__(self._step, packed)
        self.model, self.hidden, self.batches, self.word = model, hidden, batches, word
        self.targets = [t.to(word.dtype) for t in work.targets]
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def _gradients(self):
        outputs = []
        with torch.enable_grad():
            self.optimizer.zero_grad()
            for batch, target in zip(self.batches, self.targets, strict=True):
                out = self.hidden(batch)
                (out * target).sum().backward()
                outputs.append(out.detach())
        return outputs

    def _step(self):
        self._gradients()
        self.optimizer.step()

    def call(self, backward):
        self.model.train()
        return self._step

    def results(self, backward):
        self.model.eval()
        outputs = self._gradients()
        return [self.packed(outputs), self.word.grad.clone()]


# ------------------------------------------------------------------------------------------------
# PyTorch
# ------------------------------------------------------------------------------------------------


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

    def wrap(self, function):
        import torch._functorch.config

        torch._dynamo.reset()
        torch._functorch.config.donated_buffer = False  # backward runs more than once
        return torch.compile(function, mode=self.mode)

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
    """scaled_dot_product_attention, a call a sequence: no padding, many launches."""

    name = "SDPA, a call a sequence"

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


# ------------------------------------------------------------------------------------------------
# Hugging Face and the engines
# ------------------------------------------------------------------------------------------------


class HuggingFace(Peer):
    package = "transformers"

    def __init__(self, implementation):
        self.implementation, self.name = implementation, f"HF {implementation}"
        if implementation.startswith("flash"):
            self.devices, self.dtypes = ("cuda",), (torch.bfloat16, torch.float16)
            self.package = "flash_attn"

    def load(self, work):
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        model = transformers.AutoModel.from_pretrained(
            work.checkpoint, attn_implementation=self.implementation, dtype=work.dtype
        )
        return model.eval().to(work.device)

    def layer(self, work, inputs, wrap=_unwrapped):
        (x, dout), mask = inputs, work.mask
        additive = None
        if not bool(mask.all()):
            additive = torch.zeros(mask.shape, dtype=work.dtype, device=x.device)
            additive = additive.masked_fill(~mask, torch.finfo(work.dtype).min)[:, None, None]
            additive = additive.expand(-1, 1, mask.shape[1], -1).contiguous()
        encoder = wrap(self.load(work).encoder)
        return Run(lambda: encoder(x, additive)[0], packer(mask), (x,), dout)

    def model(self, work, inputs, wrap=_unwrapped):
        model = wrap(self.load(work))
        batches, packed = on_device(inputs, work.device)
        return Run(lambda: [model(**batch).last_hidden_state for batch in batches], packed)

    def train(self, work, inputs, wrap=_unwrapped):
        model = self.load(work)
        batches, packed = on_device(inputs, work.device)
        called = wrap(model)
        word = model.get_input_embeddings().weight
        hidden = lambda batch: called(**batch).last_hidden_state  # noqa: E731
        return Step(work, model, hidden, batches, packed, word)


class Accelerated(HuggingFace):
    """Hugging Face's model after ``bert_fast.accelerate``: only its encoder is ours."""

    layer = None

    def __init__(self):
        super().__init__("sdpa")
        self.name = "bert_fast.accelerate"

    def load(self, work):
        from bert_fast.hugging_face import accelerate

        return accelerate(super().load(work), prepack=not work.backward)


class Engine(Peer):
    """An inference engine on the CPU in float32, from Hugging Face's checkpoint."""

    devices, dtypes, inference = ("cpu",), (torch.float32,), True
    slow_to_make = True

    @staticmethod
    def exportable(work):
        """Hugging Face's model with tensors alone going in and out."""
        model = HuggingFace("eager").load(work)

        class Exportable(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, input_ids, attention_mask):
                return self.model(input_ids, attention_mask).last_hidden_state

        return Exportable().eval()

    def model(self, work, inputs):
        _, packed = on_device(inputs, "cpu")
        engine = self.engine(work, inputs)
        return Run(lambda: [engine(batch) for batch in inputs], packed)


class OnnxRuntime(Engine):
    """The default export with the transformer optimizer's fusions on top; the plain export where
    ONNX Runtime cannot load its own fused graph (MiniLM's)."""

    name, package = "ONNX Runtime", "onnxruntime"

    def engine(self, work, inputs):
        import onnxruntime
        from onnxruntime.transformers import optimizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        providers = ["CPUExecutionProvider"]
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.onnx"
            names = list(inputs[0])
            axes = {name: {0: "batch", 1: "seqlen"} for name in names} if len(inputs) > 1 else None
            torch.onnx.export(
                self.exportable(work), tuple(inputs[0].values()), path, input_names=names,
                **(dict(dynamic_axes=axes, dynamo=False) if axes else {}),
            )  # fmt: skip
            config = work.config
            fused = optimizer.optimize_model(
                str(path), "bert", num_heads=config.num_attention_heads,
                hidden_size=config.hidden_size,
            )  # fmt: skip
            best = path.with_suffix(".fused.onnx")
            fused.save_model_to_file(str(best), use_external_data_format=True)
            try:
                session = onnxruntime.InferenceSession(best, options, providers=providers)
            except Exception:  # onnxruntime's exceptions have no common name
                session = onnxruntime.InferenceSession(path, options, providers=providers)
        wanted = {given.name for given in session.get_inputs()}

        def run(batch):
            arrays = {name: t.numpy() for name, t in batch.items() if name in wanted}
            return torch.from_numpy(session.run(None, arrays)[0])

        return run


class OpenVINO(Engine):
    name, package = "OpenVINO", "openvino"

    def engine(self, work, inputs):
        import openvino

        model = openvino.convert_model(self.exportable(work), example_input=dict(inputs[0]))
        threads = torch.get_num_threads()
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        engine = openvino.compile_model(model, "CPU", options)

        def run(batch):
            answer = engine({name: tensor.numpy() for name, tensor in batch.items()})[0]
            return torch.from_numpy(answer.copy())  # the engine writes over it next time

        return run


class CTranslate2(Engine):
    """Unpads by itself, as we do."""

    name, package = "CTranslate2", "ctranslate2"

    def engine(self, work, inputs):
        import json
        import shutil

        import ctranslate2
        import numpy as np

        with tempfile.TemporaryDirectory() as scratch:
            # Its converter still reads a key that transformers 5 no longer writes.
            source = shutil.copytree(work.checkpoint, Path(scratch) / "checkpoint")
            config = json.loads((source / "config.json").read_text(encoding="utf-8"))
            config["position_embedding_type"] = "absolute"
            (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
            converter = ctranslate2.converters.TransformersConverter(str(source))
            converted = converter.convert(str(Path(scratch) / "converted"))
            encoder = ctranslate2.Encoder(
                converted, compute_type="float32", intra_threads=torch.get_num_threads()
            )
        unpadded = {}
        for batch in inputs:
            rows = zip(batch["input_ids"], batch["attention_mask"].sum(1).tolist(), strict=True)
            unpadded[id(batch)] = [ids[:length].tolist() for ids, length in rows]

        def run(batch):
            output = encoder.forward_batch(unpadded[id(batch)])
            return torch.from_numpy(np.array(output.last_hidden_state))

        return run


class FlashAttention(Peer):
    name, package = "flash-attn", "flash_attn"
    devices, dtypes = ("cuda",), (torch.bfloat16, torch.float16)

    def attention(self, work, inputs):
        from flash_attn import flash_attn_varlen_qkvpacked_func

        (qkv, dout), cu = inputs, work.cu_seqlens
        forward = lambda: flash_attn_varlen_qkvpacked_func(  # noqa: E731
            qkv, cu, work.max_seqlen, causal=work.causal
        )
        return Run(forward, leaves=(qkv,), dout=dout)


class Xformers(Peer):
    name, package = "xformers", "xformers"
    devices = ("cuda",)

    def attention(self, work, inputs):
        from xformers.ops import fmha

        qkv, dout = inputs
        blocks = fmha.attn_bias.BlockDiagonalMask.from_seqlens(list(work.lengths))
        blocks = blocks.make_causal() if work.causal else blocks
        forward = lambda: fmha.memory_efficient_attention(  # noqa: E731
            *(t[None] for t in qkv.unbind(1)), attn_bias=blocks
        )[0]
        return Run(forward, leaves=(qkv,), dout=dout)


# ------------------------------------------------------------------------------------------------
# Ceilings: what the machine itself can do, in the same rounds
# ------------------------------------------------------------------------------------------------


class Copy(Peer):
    """Moves as many bytes as the work must (read + written), by one tensor copy."""

    name, ceiling = "copy, as many bytes", True

    def _run(self, work, inputs):
        source = torch.empty(work.num_bytes // 2, dtype=torch.uint8, device=work.device)
        target = torch.zeros_like(source.fill_(1))
        return Run(lambda: target.copy_(source))

    attention = layer_norm = gelu = linear_gelu = _run


class Gemms(Peer):
    """The work's matrix products alone, on real tokens, into memory that is there already:
    torch.mm (MKL or oneDNN; cuBLAS), or our packed linear on AMX."""

    ceiling = True

    def __init__(self, packed=False):
        self.packed = packed
        self.name = "GEMMs alone" + (", AMX" if packed else "")
        if packed:
            self.devices, self.dtypes, self.inference = ("cpu",), (torch.float32,), True

    def why_absent(self, work):
        if self.packed and not has_amx():
            return "this processor has no AMX"
        return super().why_absent(work)

    def attention(self, work, inputs):
        """As many FLOPs in one product of a shape that suits the machine."""
        side = 64 * max(1, round((work.flops / 2) ** (1 / 3) / 64))
        return self._products(work, [(side, max(1, work.flops // (2 * side * side)), side)])

    def linear_gelu(self, work, inputs):
        shape = work.rows, work.width, work.out_width
        return self._products(work, [shape], work.backward, forward=not work.backward)

    def model(self, work, inputs, forward=True):
        config = work.config
        hidden, wide = config.hidden_size, config.intermediate_size
        shapes = [(3 * hidden, hidden), (hidden, hidden), (wide, hidden), (hidden, wide)]
        shapes = [(sum(b), i, o) for b in work.batches for o, i in shapes]
        return self._products(work, shapes, work.backward, forward, times=config.num_hidden_layers)

    train = model

    def layer(self, work, inputs):
        return self.model(work, inputs, forward=not work.backward)

    def _products(self, work, shapes, backward=False, forward=True, times=1):
        options = dict(device=work.device, dtype=work.dtype)
        calls, workspace = [], Workspace()
        for rows, i, o in shapes:
            x, weight = torch.randn(rows, i, **options), torch.randn(o, i, **options)
            # Not empty: leftover bits may be denormals, on which a product takes 100 times as long.
            out = torch.randn(rows, o, **options)
            if self.packed:
                weight = torch.nn.Parameter(weight)
                pack = ops.pack_weight(weight)
                calls.append(functools.partial(pack.forward, x, weight, None, None, out, workspace))
                continue
            if forward:
                calls.append(functools.partial(torch.mm, x, weight.t(), out=out))
            if backward:  # dx = dout W, dW = doutᵀ x
                dx, dweight = torch.empty_like(x), torch.empty_like(weight)
                calls.append(functools.partial(torch.mm, out, weight, out=dx))
                calls.append(functools.partial(torch.mm, out.t(), x, out=dweight))

        def run():
            for _ in range(times):
                for call in calls:
                    call()

        return Run(run)


def peers(device):
    """Everyone, ours first: what the others' times are divided by."""
    own = [b for b in backends.AUTO[device] if b != "eager" and not backends.why_unavailable(b)]
    return [
        Ours(),
        *(Ours(b, name=f"bert_fast {b}") for b in own if len(own) > 1),
        NotPrepacked(),
        Accelerated(),
        Eager(),
        Torch(),
        Compiled("default"),
        Compiled("max-autotune"),
        Sdpa(),
        Sdpa("MATH"),
        Sdpa("FLASH_ATTENTION"),
        Sdpa("EFFICIENT_ATTENTION"),
        Sdpa("CUDNN_ATTENTION"),
        SdpaLoop(),
        TorchEncoderLayer(),
        HuggingFace("eager"),
        HuggingFace("sdpa"),
        HuggingFace("flash_attention_2"),
        OnnxRuntime(),
        OpenVINO(),
        CTranslate2(),
        FlashAttention(),
        Xformers(),
        Copy(),
        Gemms(),
        Gemms(packed=True),
    ]
