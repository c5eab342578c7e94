"""Hugging Face's models, as they are and accelerated."""

import torch

from bert_fast.bench.contestant import Run
from bert_fast.bench.peers.layouts import Step, on_device, packer, unwrapped
from bert_fast.bench.peers.peer import Peer


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

    def layer(self, work, inputs, wrap=unwrapped):
        (x, dout), mask = inputs, work.mask
        additive = None
        if not bool(mask.all()):
            additive = torch.zeros(mask.shape, dtype=work.dtype, device=x.device)
            additive = additive.masked_fill(~mask, torch.finfo(work.dtype).min)[:, None, None]
            additive = additive.expand(-1, 1, mask.shape[1], -1).contiguous()
        encoder = wrap(self.load(work).encoder)
        return Run(lambda: encoder(x, additive)[0], packer(mask), (x,), dout)

    def model(self, work, inputs, wrap=unwrapped):
        model = wrap(self.load(work))
        batches, packed = on_device(inputs, work.device)
        return Run(lambda: [model(**batch).last_hidden_state for batch in batches], packed)

    def train(self, work, inputs, wrap=unwrapped):
        model = self.load(work)
        batches, packed = on_device(inputs, work.device)
        called = wrap(model)
        word = model.get_input_embeddings().weight
        hidden = lambda batch: called(**batch).last_hidden_state  # noqa: E731
        return Step(work, model, hidden, batches, packed, word)


class Accelerated(HuggingFace):
    """Hugging Face's model after ``bert_fast.accelerate``: only its encoder is ours. In inference
    on a CPU it is a float32 model whose products are of the work's dtype; int8 is that alone."""

    layer = None  # type: ignore[assignment]
    dtypes = (*HuggingFace.dtypes, torch.int8)

    def __init__(self):
        super().__init__("sdpa")
        self.name = "bert_fast.accelerate"

    def load(self, work):
        from bert_fast.hugging_face import accelerate

        low = work.device == "cpu" and work.dtype in (torch.bfloat16, torch.int8)
        if low and not work.backward:
            return accelerate(super().load(work.in_dtype(torch.float32)), dtype=work.dtype)
        return accelerate(super().load(work), prepack=not work.backward)


class QuantisedInt8(HuggingFace):
    """Hugging Face's model after PyTorch's own dynamic int8: weights per channel or tensor,
    activations by what each call brings."""

    layer = train = None  # type: ignore[assignment]
    devices, dtypes, inference, slow_to_make = ("cpu",), (torch.int8,), True, True

    def __init__(self):
        super().__init__("sdpa")
        self.name = "torch dynamic int8"

    def load(self, work):
        return self.quantised(super().load(work.in_dtype(torch.float32)))

    def quantised(self, model):
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


class TorchAo(QuantisedInt8):
    """The same by torchao, compiled, which it is made for."""

    def __init__(self):
        super().__init__()
        self.name, self.package = "torchao int8, compiled", "torchao"

    def quantised(self, model):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        torch._dynamo.reset()
        return torch.compile(model)


class Zentorch(HuggingFace):
    """AMD's plugin of PyTorch, by torch.compile."""

    layer = train = None  # type: ignore[assignment]
    devices, dtypes, inference, slow_to_make = ("cpu",), (torch.float32, torch.bfloat16), True, True
    own_precision = True

    def __init__(self):
        super().__init__("sdpa")
        self.name, self.package = "zentorch", "zentorch"

    def load(self, work):
        import zentorch  # noqa: F401, it registers its backend

        torch._dynamo.reset()
        return torch.compile(super().load(work), backend="zentorch")


class InFloat32(Peer):
    """Another peer in float32, beside works of a cheaper dtype: what the ratio is taken to."""

    def __init__(self, peer):
        self.peer, self.name = peer, f"{peer.name}, float32"
        self.slow_to_make = peer.slow_to_make

    def why_absent(self, work):
        return self.peer.why_absent(work.in_dtype(torch.float32))

    def model(self, work, inputs):
        return self.peer.model(work.in_dtype(torch.float32), inputs)
