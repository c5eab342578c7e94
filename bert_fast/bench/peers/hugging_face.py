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
    """Hugging Face's model after ``bert_fast.accelerate``: only its encoder is ours."""

    layer = None  # type: ignore[assignment]

    def __init__(self):
        super().__init__("sdpa")
        self.name = "bert_fast.accelerate"

    def load(self, work):
        from bert_fast.hugging_face import accelerate

        return accelerate(super().load(work), prepack=not work.backward)
