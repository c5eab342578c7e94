"""CoNLL's files: a word and its tag a line, blank lines between sentences."""

import re

from bert_fast.text import DataError, read_lines

DOCUMENT = "-DOCSTART-"


def read_conll(path, labelled=True):
    """[(words, tags)], a pair a sentence; tags are None where not ``labelled``.

    The word is the first column, the tag the last. Tabs part columns where every word's line has
    one, else tabs and spaces do; all lines have the same number. A line of ``-DOCSTART-`` ends a
    sentence and is no word. A line before a sentence that begins with "# ", or is "#", is a comment
    where its columns are not as many as a word's.

    Raises:
        DataError: naming the file and the line that is neither.
    """
    lines = read_lines(path)
    plain = [line for line in lines if line.strip() and not _hash(line) and not _document(line)]
    parted = re.compile(r"\t" if plain and all("\t" in line for line in plain) else r"[ \t]+")
    sentences, rows, expected, doubtful = [], [], None, []
    if plain:
        expected = len(_columns(parted, plain[0]))
    for number, line in enumerate([*lines, ""], 1):
        columns = _columns(parted, line)
        if not line.strip() or _document(line):
            if rows:
                sentences.append(rows)
            rows = []
        elif _hash(line) and not rows and len(columns) != expected:
            continue  # a comment
        elif labelled and (len(columns) < 2 or not columns[-1]):
            raise DataError(f"{path}:{number}: a word and its tag expected, not {line!r}")
        elif len(columns) != expected or not columns[0]:
            raise DataError(f"{path}:{number}: {len(columns)} columns, not {expected}: {line!r}")
        else:
            if _hash(line) and not rows:
                doubtful.append((number, columns[-1]))
            rows.append(columns)
    _refuse_other_forms(path, sentences, [_columns(parted, line)[-1] for line in plain],
                        doubtful if labelled else [])  # fmt: skip
    return [
        ([columns[0] for columns in rows], [columns[-1] for columns in rows] if labelled else None)
        for rows in sentences
    ]


def _refuse_other_forms(path, sentences, tags, doubtful):
    for number, tag in doubtful:
        if tag not in tags:
            raise DataError(f"{path}:{number}: a comment, or the word '#' with the tag {tag!r}?")
    long = [[columns[0] for columns in rows] for rows in sentences if len(rows) > 1]
    if long and all(words == [str(i + 1) for i in range(len(words))] for words in long):
        raise DataError(f"{path}: the first column numbers the words, as in CoNLL-U; it must be "
                        "the word itself")  # fmt: skip


def _columns(parted, line):
    return [
        c.strip(" ") for c in parted.split(line.strip(" " if parted.pattern == r"\t" else " \t"))
    ]


def _hash(line):
    return line.startswith(("# ", "#\t")) or line.strip() == "#"


def _document(line):
    return line.startswith(DOCUMENT) and line[len(DOCUMENT) :][:1] in ("", " ", "\t")
