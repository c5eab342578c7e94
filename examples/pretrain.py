"""A small BERT from scratch on the Brown corpus (1.16 million words), minutes on two cores.

python examples/pretrain.py
"""

import tempfile
from pathlib import Path

from bert_fast.bench import data
from bert_fast.training.pretrain import Settings, pretrain


def main(documents=500, steps=300, **settings):
    def show(step, record):
        if step % 20 == 0:
            speed = record["tokens_per_second"]
            print(f"step {step}: loss {record['loss']:.2f}, {speed:,.0f} tokens/s")

    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "brown.txt"
        data.brown_text(text, data.brown()[:documents])
        figures = pretrain(
            Settings(text=[str(text)], out=f"{scratch}/run", steps=steps, **settings), show
        )
    print(figures)
    return figures


if __name__ == "__main__":
    main(max_length=64, lr=1e-3)
