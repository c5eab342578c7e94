"""English into German: MiniLM reads, a new decoder writes; LibreOffice's help, pages held out.

python examples/translation.py
"""

import tempfile
from pathlib import Path

from bert_fast.bench import data
from bert_fast.training import tasks
from bert_fast.training.finetune import Settings, finetune


def main(limit=None, epochs=4, **settings):
    pairs = data.english_and_german()[:limit]
    pages = sorted({page for page, _, _ in pairs})
    held_out = set(pages[::40])
    with tempfile.TemporaryDirectory() as scratch:
        paths = {}
        for name, wanted in (("train", False), ("test", True)):
            some = [(a, b) for page, a, b in pairs if (page in held_out) == wanted]
            for side, lines in zip((name, f"{name}_targets"), zip(*some, strict=True), strict=True):
                paths[side] = str(Path(scratch) / f"{side}.txt")
                Path(paths[side]).write_text("\n".join(lines) + "\n", encoding="utf-8")
        settings = Settings(
            task="translation",
            model=str(data.minilm()),
            out=f"{scratch}/tuned",
            epochs=epochs,
            **paths,
            **settings,
        )

        def show(step, steps, loss):
            if step % 20 == 0:
                print(f"step {step} of {steps}: loss {loss:.2f}", flush=True)

        tuned, figures = finetune(settings, show)
        print(figures)
        for text in ("Click the icon to open the file.", "Choose Format - Character."):
            print(f"{text} {tuned.predict([tasks.Example(text)])[0]}")
    return figures


if __name__ == "__main__":
    main(max_length=96, batch_tokens=4096)
