"""``bert-fast bench --protocol sentence-transformers``: the published way to compare backends.

https://sbert.net/docs/sentence_transformer/usage/efficiency.html: short, medium and long texts (39,
620 and 9,589 characters on average, there of STSb, Natural Questions, IMDb); several batch sizes,
of which each backend's best counts; speed over PyTorch's float32, the median over models and
texts; quality beside it, as a share of float32's.

Here: texts made of film reviews and plots; nDCG@10 of a film's reviews found by its plot;
all-MiniLM-L6-v2 as it is, and the shapes of BERT-base and XLM-R-base with drawn weights and
MiniLM's tokens, for speed alone.
"""

import contextlib
import json
import random
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bert_fast.bench import data, quality
from bert_fast.bench.encoders import BACKENDS, REFERENCE, absent, make, parted
from bert_fast.bench.run import quiet

TEXTS = {"short": (38.9, 13.9), "medium": (619.6, 345.3), "long": (9589.3, 633.4)}  # characters
SAMPLES = 1000
BATCH_SIZES = (16, 32, 64, 128)
SHAPES = {
    "bert-base": ("bert", {}),
    "xlm-r-base": ("xlm-roberta", {"type_vocab_size": 1, "max_position_embeddings": 514}),
}
MODELS = ("minilm-l6", *SHAPES)
DRAWN_FILMS = 3


@dataclass
class Plan:
    """How much is done."""

    models: tuple = MODELS  # names of MODELS, or directories
    samples: int = SAMPLES  # texts of each length
    batch_sizes: tuple = BATCH_SIZES
    films: int = 200  # of which reviews are found by plots
    calibration: int = 300  # texts, as many as optimum's OVQuantizationConfig takes
    lengths: tuple = tuple(TEXTS)
    peers: tuple | None = None  # names, or parts of names; None: all


QUICK = Plan(models=("minilm-l6",), samples=8, batch_sizes=(8,), films=3, calibration=8,
             lengths=("short",))  # fmt: skip


def texts(length, samples, seed=0):
    """Film reviews and plots cut, or put one after the other, to lengths drawn by ``TEXTS``."""
    mean, deviation = TEXTS[length]
    draw = random.Random(seed)
    pool = [text for film in data.films() for text in (film.plot, *film.reviews)]
    made = []
    for _ in range(samples):
        wanted, text = max(8, round(draw.gauss(mean, deviation))), ""
        while len(text) < wanted:
            text += draw.choice(pool) + " "
        made.append(text[:wanted].strip())
    return made


@contextlib.contextmanager
def checkpoint(model):
    """The directory of a model of ``MODELS``, or the given one.

    Raises:
        ValueError: it is neither.
    """
    if model == "minilm-l6":
        yield data.minilm()
    elif model in SHAPES:
        with tempfile.TemporaryDirectory(prefix="bert_fast-bench-") as scratch:
            yield draw(Path(scratch) / model, *SHAPES[model])
    elif (Path(model) / "config.json").is_file():
        yield Path(model)
    else:
        raise ValueError(
            f"--models: {model!r} is neither one of {', '.join(MODELS)} nor a directory with a "
            "config.json"
        )


def draw(directory, kind, changes, source=None):
    """A model of BERT-base's size of ``kind`` with drawn weights, and ``source``'s tokenizer and
    modules (default all-MiniLM-L6-v2's)."""
    import transformers

    source = Path(source or data.minilm())
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    vocabulary = json.loads((source / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    sizes = {"vocab_size": vocabulary, "pad_token_id": 0, **changes}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    transformers.AutoModel.from_config(config).save_pretrained(directory)
    for path in directory.glob("*Pooling/config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        for name in ("word_embedding_dimension", "embedding_dimension"):  # earlier versions, later
            if name in settings:
                settings[name] = config.hidden_size
        path.write_text(json.dumps(settings), encoding="utf-8")
    return directory


def run(plan, show=print):
    """Rows: {"model", "texts", "backend", "texts_per_second", "batch_size", "speedup", and of real
    models "cosine" and "ndcg"}, or {"model", "backend", "refused"}; and why others are absent."""
    rows, missing = [], {}
    _chosen(plan)
    for model in plan.models:
        real = model not in SHAPES
        with checkpoint(model) as directory:
            rows += _of_model(plan, model, directory, real, missing, show)
    return rows, missing


def _of_model(plan, model, directory, real, missing, show):
    sets = {length: texts(length, plan.samples) for length in plan.lengths}
    # Drawn models' vectors are compared with float32's alone, of which a few say enough.
    films = data.films()[-(plan.films if real else min(plan.films, DRAWN_FILMS)) :]
    plots, reviews = [film.plot for film in films], [r for film in films for r in film.reviews]
    ends = [sum(len(film.reviews) for film in films[: i + 1]) for i in range(len(films))]
    relevant = [set(range(end - len(f.reviews), end)) for f, end in zip(films, ends, strict=True)]
    # Other texts than those that are measured: films from the list's beginning.
    calibration = [text for film in data.films()[:100] for text in (film.plot, *film.reviews)]
    calibration = calibration[: plan.calibration]
    exact, rows, base = None, [], {}
    for name in _chosen(plan):
        if (reason := absent(name)) is not None:
            missing[name] = reason
            continue
        show(f"{model}: {name}")
        try:
            with quiet():
                encode = make(name, directory, calibration)
                embeddings = [encode(some, plan.batch_sizes[0]) for some in (plots, reviews)]
        except Exception as error:  # whatever another package raises, the others are measured
            missing[f"{name} ({model})"] = f"{type(error).__name__}: {str(error)[:120]}"
            continue
        exact = embeddings if exact is None else exact
        refused = _refusal(embeddings[1], exact[1], parted(name)[1])
        if refused is not None:
            rows.append({"model": model, "backend": name, "refused": refused})
            continue
        found = {"model": model, "backend": name}
        if real:
            found["cosine"] = quality.cosines(embeddings[1], exact[1])
            found["ndcg"] = quality.ndcg(*embeddings, relevant)
        for length, some in sets.items():
            with quiet():
                rate, size = best(encode, some, plan.batch_sizes)
            base.setdefault(length, rate)
            rows.append({**found, "texts": length, "texts_per_second": rate, "batch_size": size,
                         "speedup": rate / base[length]})  # fmt: skip
    return rows


def _refusal(embeddings, exact, dtype):
    return quality.refusal(*(torch.from_numpy(array) for array in (embeddings, exact)), dtype)


def _chosen(plan):
    """The names of the backends: the reference first."""
    if plan.peers is None:
        return BACKENDS
    for asked in plan.peers:
        if not any(asked.lower() in name.lower() for name in BACKENDS):
            raise ValueError(
                f"--peers: no backend is called {asked!r}; there are {', '.join(BACKENDS)}"
            )
    wanted = [n for n in BACKENDS if any(asked.lower() in n.lower() for asked in plan.peers)]
    return list(dict.fromkeys([REFERENCE, *wanted]))


def best(encode, some, sizes, seconds=1.0):
    """(texts per second, batch size) of the best of ``sizes``: of each the median of calls that
    take so long together, or of one, after a call to warm up."""
    found = []
    for size in dict.fromkeys(min(size, len(some)) for size in sizes):
        encode(some[:size], size)
        taken = []
        while not taken or sum(taken) < seconds:
            begin = time.perf_counter()
            encode(some, size)
            taken.append(time.perf_counter() - begin)
        found.append((len(some) / statistics.median(taken), size))
    return max(found)


def summary(rows):
    """backend -> {"speedup": median over models and texts, "quality": nDCG over float32's, median
    over real models, "cosine": the least means of them}."""
    exact = {
        row["model"]: row["ndcg"] for row in rows if row["backend"] == REFERENCE and "ndcg" in row
    }
    found = {}
    for name in dict.fromkeys(row["backend"] for row in rows if "speedup" in row):
        own = [row for row in rows if row["backend"] == name and "speedup" in row]
        found[name] = {"speedup": statistics.median(row["speedup"] for row in own)}
        real = [row for row in own if "ndcg" in row and exact.get(row["model"])]
        if real:
            ratios = [row["ndcg"] / exact[row["model"]] for row in real]
            found[name]["quality"] = statistics.median(ratios)
            found[name]["cosine"] = min((row["cosine"] for row in real), key=lambda c: c["mean"])
    return found
