"""Sentiment of film reviews: MiniLM fine-tuned on fresh and rotten, judged on films it never saw.

python examples/sentiment.py
"""

import json
import tempfile
from pathlib import Path

from bert_fast.bench import data
from bert_fast.training import tasks
from bert_fast.training.finetune import Settings, finetune


def main(limit=4000, epochs=2):
    reviews = data.reviews()[:limit]
    films = sorted({film for film, _, _ in reviews})
    held_out = set(films[::10])
    with tempfile.TemporaryDirectory() as scratch:
        paths = {}
        for name, wanted in (("train", False), ("test", True)):
            rows = [
                json.dumps({"text": text, "label": label})
                for film, text, label in reviews
                if (film in held_out) == wanted
            ]
            paths[name] = str(Path(scratch) / f"{name}.jsonl")
            Path(paths[name]).write_text("\n".join(rows) + "\n", encoding="utf-8")
        settings = Settings(
            task="sentiment",
            model=str(data.minilm()),
            out=f"{scratch}/tuned",
            epochs=epochs,
            **paths,
        )
        tuned, figures = finetune(settings)
        print(figures)
        for text in ("A quiet triumph.", "Two hours I will never get back."):
            ((label, scores),) = tuned.predict([tasks.Example(text)])
            print(f"{label} ({scores[label]:.0%}): {text}")
    return figures


if __name__ == "__main__":
    main()
