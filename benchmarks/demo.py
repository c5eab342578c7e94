"""make demo: a real search over real text by a real checkpoint, ours beside Hugging Face's.

Embeds films' plots and reviews with all-MiniLM-L6-v2, answers a few questions, finds each film's
reviews from its plot (recall@k), and times the same work in Hugging Face.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

from bert_fast.bench import data
from bert_fast.bench.compare import compare, report

QUESTIONS = [
    "a heist that goes wrong and the thieves turn on each other",
    "an animated film about toys or animals that children will love",
    "a slow, beautiful documentary about nature",
    "the sequel nobody needed, loud and empty",
]


def recall_at(embeddings, queries, documents, relevant, k):
    """Mean share of queries for which one of the k nearest documents is relevant."""
    scores = embeddings[queries] @ embeddings[documents].T
    nearest = np.argsort(-scores, axis=1)[:, :k]
    hits = [bool(set(row) & relevant[i]) for i, row in enumerate(nearest)]
    return float(np.mean(hits))


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--films", type=int, default=100, help="how many films (default 100)")
    options.add_argument(
        "--plot",
        default="out/demo.png",
        help="draw the times to this PNG file (default out/demo.png)",
    )
    args = options.parse_args()
    console = Console(width=110)

    films = data.films()[: args.films]
    texts, owner = list(QUESTIONS), []
    texts += [film.plot for film in films]
    for i, film in enumerate(films):
        texts += film.reviews
        owner += [i] * len(film.reviews)
    queries = np.arange(len(QUESTIONS), len(QUESTIONS) + len(films))
    documents = np.arange(len(QUESTIONS) + len(films), len(texts))
    console.print(f"{len(films)} plots and {len(owner)} reviews, all-MiniLM-L6-v2, fp32 ...")
    try:
        rows, tokens = compare(data.minilm(), texts, rounds=2)
    except ImportError as error:
        sys.exit(str(error))
    ours = rows[-1].embeddings

    for i, question in enumerate(QUESTIONS):
        scores = ours[documents] @ ours[i]
        console.print(f"\n[bold]{question}[/bold]")
        for j in np.argsort(-scores)[:3]:
            console.print(
                f"  {scores[j]:.2f}  [cyan]{films[owner[j]].name}[/cyan]  {texts[documents[j]]}",
                highlight=False, no_wrap=True, overflow="ellipsis",
            )  # fmt: skip

    relevant = [set() for _ in films]
    for j, film in enumerate(owner):
        relevant[film].add(j)
    console.print("\nA film's reviews, found from its plot:")
    for row in rows:
        recalls = [recall_at(row.embeddings, queries, documents, relevant, k) for k in (1, 5, 10)]
        console.print(
            f"  {row.name:20s}"
            + "  ".join(f"recall@{k} {r:.4f}" for k, r in zip((1, 5, 10), recalls, strict=True))
        )
    console.print()
    difference = report(rows, tokens, Path(args.plot), console)
    if difference > 2e-5:
        sys.exit(f"embeddings differ from Hugging Face's by {difference:.1e}, more than 2e-5")


if __name__ == "__main__":
    main()
