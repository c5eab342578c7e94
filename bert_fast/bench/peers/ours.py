"""bert_fast's own ops and models, on one backend; and the definition that all are compared with."""

import contextlib

import torch
import torch.nn.functional as F

import bert_fast
from bert_fast import backends, ops
from bert_fast.bench.contestant import Run
from bert_fast.bench.peers.layouts import Step, on_device
from bert_fast.bench.peers.peer import Absent, Peer
from bert_fast.models.blocks import Linear
from bert_fast.models.workspace import NoWorkspace, Workspace
from bert_fast.ops import reference


class Ours(Peer):
    """Our ops and model on one backend. In inference they write into memory that is there already,
    as the model has them do. int8 is of whole models alone."""

    dtypes = (*Peer.dtypes, torch.int8)
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

    def why_absent(self, work):
        if work.dtype == torch.int8 and (
            work.device != "cpu" or self.backend not in ("auto", "cpu")
        ):
            return "has int8 on the CPU alone"
        return super().why_absent(work)

    def _served(self, work):
        """The model in a cheaper format: weights packed, results in float32."""
        name = str(work.dtype).removeprefix("torch.")
        model = bert_fast.BertModel.from_pretrained(work.checkpoint, torch.float32)
        return model.for_inference(dtype=name)

    def load(self, work):
        served = work.kind == "model" and work.device == "cpu" and self.prepack
        if served and work.dtype in (torch.int8, torch.bfloat16):
            return self._served(work)
        model = bert_fast.BertModel.from_pretrained(work.checkpoint, work.compute)
        model = model.to(work.device).eval()
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
                return model.layers[0](x, packing, workspace)

        return Run(forward, leaves=(packed,), dout=dout[mask])

    def model(self, work, inputs):
        if work.dtype != torch.int8:
            self._check("attention", work)
        model = self.load(work)
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


class Graphs(Ours):
    """Our model by :func:`bert_fast.cudagraph`: one launch a batch."""

    attention = layer_norm = gelu = linear_gelu = layer = train = None  # type: ignore[assignment]
    devices, dtypes, inference = ("cuda",), Peer.dtypes, True

    def __init__(self):
        super().__init__(name="bert_fast.cudagraph")

    def load(self, work):
        return bert_fast.cudagraph(super().load(work))


class NotPrepacked(Ours):
    """Ours where ``prepack()`` was not called: torch's own products."""

    attention = layer_norm = gelu = train = None  # type: ignore[assignment]
    dtypes = Peer.dtypes

    def __init__(self):
        super().__init__(prepack=False, name="bert_fast, not prepacked")

    def why_absent(self, work):
        if work.backward or work.device != "cpu" or not can_prepack():
            return "nothing would be prepacked here"
        return super().why_absent(work)


def can_prepack():
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
