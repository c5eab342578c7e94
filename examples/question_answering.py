"""Answers found in a text: MiniLM fine-tuned on questions derived from film reviews' own words.

The questions are made here, for want of a real set: "what film is this about" asks for the name of
the film, which is put into a review's text. Real ones come as SQuAD's JSON in the same way.

python examples/question_answering.py
"""

import json
import random
import tempfile
from pathlib import Path

from bert_fast.bench import data
from bert_fast.training import tasks
from bert_fast.training.finetune import Settings, finetune


def squad(reviews, rng):
    """SQuAD's JSON; one question in five has no answer."""
    paragraphs = []
    for film, text, _ in reviews:
        words, answers = text.split(), []
        if rng.random() < 0.8:
            place = rng.randrange(len(words) + 1)
            words.insert(place, f"({film})")
            begin = len(" ".join([*words[:place], ""])) + 1
            answers = [{"text": film, "answer_start": begin}]
        question = {"question": "what film is this about", "answers": answers}
        paragraphs.append({"context": " ".join(words), "qas": [question]})
    return json.dumps({"data": [{"paragraphs": paragraphs}]})


def main(limit=1500, epochs=2):
    rng, reviews = random.Random(0), data.reviews()[:limit]
    with tempfile.TemporaryDirectory() as scratch:
        train, test = Path(scratch) / "train.json", Path(scratch) / "test.json"
        train.write_text(squad(reviews[limit // 10 :], rng), encoding="utf-8")
        test.write_text(squad(reviews[: limit // 10], rng), encoding="utf-8")
        settings = Settings(
            task="qa", model=str(data.minilm()), train=str(train), test=str(test),
            out=f"{scratch}/tuned", epochs=epochs, lr=3e-4,
        )  # fmt: skip
        tuned, figures = finetune(settings)
    print(figures)
    example = tasks.Example("what film is this about", "A heist (The Sting) told with charm.")
    print(tuned.predict([example]))
    return figures


if __name__ == "__main__":
    main()
