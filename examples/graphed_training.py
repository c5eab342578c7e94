"""Training with forward and backward as CUDA graphs, for a GPU that waits for its host.

python examples/graphed_training.py

BERT-base, 64 x 128 tokens, 70% real, without dropout, on an H200 with a slow host: a step takes
8.5 ms, and 27.2 without graphs. One such graph a process: its products share torch's workspace with
other captures (docs/architecture.md).
"""

import time

import torch

import bert_fast


class Encode(torch.nn.Module):
    """What is captured: inputs of one shape, whose real tokens fit ``capacity`` rows."""

    def __init__(self, model, capacity):
        super().__init__()
        self.model, self.capacity = model, capacity

    def forward(self, ids, mask):
        return self.model(ids, mask, capacity=self.capacity).last_hidden_state


def main(batch=64, seqlen=128, steps=20, **sizes):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = bert_fast.BertConfig(hidden_dropout_prob=0, attention_probs_dropout_prob=0, **sizes)
    model = bert_fast.BertModel(config, add_pooling_layer=False).to(device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    lengths = torch.linspace(0.4 * seqlen, seqlen, batch).long()

    def draw():
        mask = torch.arange(seqlen) < lengths[torch.randperm(batch), None]
        ids = torch.randint(1, config.vocab_size, mask.shape) * mask
        return ids.to(device), mask.to(device)

    encode = Encode(model, int(lengths.sum()))
    if device == "cuda":
        encode = torch.cuda.make_graphed_callables(encode, draw())
    for step in range(steps):
        ids, mask = draw()
        begin = time.perf_counter()
        # The gradients lie in the graph's memory: they are not accumulated over several batches.
        optimizer.zero_grad(set_to_none=True)
        states = encode(ids, mask)
        loss = (states - ids[..., None] / config.vocab_size).square()[mask].mean()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}, {1e3 * (time.perf_counter() - begin):.1f} ms")
    return loss.item()


if __name__ == "__main__":
    main()
