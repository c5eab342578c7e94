"""Parts of speech: MiniLM fine-tuned on the Brown corpus, judged on documents it never saw.

python examples/tagging.py
"""

import tempfile
from pathlib import Path

from bert_fast.bench import data
from bert_fast.training import tasks
from bert_fast.training.finetune import Settings, finetune


def main(documents=40, epochs=3):
    parts = data.brown()[:: 500 // documents]
    with tempfile.TemporaryDirectory() as scratch:
        paths = {}
        for name, some in (("train", parts[:-4]), ("test", parts[-4:])):
            paths[name] = str(Path(scratch) / f"{name}.conll")
            sentences = (
                "\n".join(f"{word} {tag.split('-')[0] or tag}" for word, tag in sentence)
                for document in some
                for sentence in document
            )
            Path(paths[name]).write_text("\n\n".join(sentences) + "\n", encoding="utf-8")
        settings = Settings(
            task="ner",
            model=str(data.minilm()),
            out=f"{scratch}/tuned",
            epochs=epochs,
            lr=5e-4,
            **paths,
        )
        tuned, figures = finetune(settings)
    print(figures)
    words = ["The", "jury", "praised", "the", "administration", "of", "the", "election"]
    (tags,) = tuned.predict([tasks.Example(words)])
    print(" ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True)))
    return figures


if __name__ == "__main__":
    main()
