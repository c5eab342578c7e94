"""Packed inputs in the layouts that peers want, and their results packed again."""

import torch

from bert_fast.bench.contestant import Run


def unwrapped(model):
    return model


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
