"""The one reader of what people write: plain lines, and rows of CSV, TSV and JSONL.

Files are UTF-8, with or without a byte-order mark. A line ends at ``\\n``, ``\\r\\n`` or ``\\r``
and nowhere else. No row is merged, split or dropped in silence: what cannot be read is refused by
file and line, and what is left out is counted in a warning.
"""

import collections
import csv
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROW_FORMATS = (".csv", ".tsv", ".jsonl")
LONGEST_FIELD = 2**31 - 1  # what csv can be told on every platform; its own default is 131,072


class DataError(ValueError):
    """A row that cannot be used; the message names the file and the line."""


def iter_lines(path, odd_endings=True) -> Iterator[str]:
    """The lines of a text file, one at a time, without their ends. ``odd_endings``: a lone ``\\r``
    among other line ends does end a line, but with a warning that names it.

    Raises:
        DataError: naming the file and the line that is not UTF-8, or has a NUL.
    """
    return (line.rstrip("\r\n") for line in _raw_lines(path, odd_endings))


def read_lines(path) -> list[str]:
    """All lines of a text file, blank ones too; see :func:`iter_lines`."""
    return list(iter_lines(path))


def read_json_file(path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: naming the file and the line that is not UTF-8 or not JSON.
    """
    try:
        return _json("".join(_raw_lines(path, odd_endings=False)))
    except ValueError as error:
        raise error if isinstance(error, DataError) else DataError(f"{path}: {error}") from error


def read_rows(path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of its first line, {column: value}) for each row of a .csv, .tsv or .jsonl file. CSV
    and TSV begin with a header. TSV has no quoting: a quote is a character, as in GLUE. Blank lines
    are no rows; a warning counts them.

    Raises:
        DataError: naming file and line.
    """
    path = Path(path)
    if path.suffix not in ROW_FORMATS:
        raise DataError(f"{path}: the name must end in .csv, .tsv or .jsonl")
    return _counting_blanks(path, (_jsonl if path.suffix == ".jsonl" else _table)(path))


def read_texts(path, keep_blank: bool = False) -> list[str]:
    """The texts of a file: one per line, or of a .jsonl, .csv or .tsv file each row's "text".

    Blank lines of plain text keep their place as they are with ``keep_blank``; else they are left
    out, and a warning counts them.

    Raises:
        DataError: naming the file, and the line, that is empty, not UTF-8 or not as expected.
    """
    path = Path(path)
    if path.suffix in ROW_FORMATS:
        texts = [_text(path, number, row) for number, row in read_rows(path)]
    else:
        numbered = enumerate(iter_lines(path), 1)
        lines = (
            (number, line if keep_blank or line.strip() else None) for number, line in numbered
        )
        texts = [line for _, line in _counting_blanks(path, lines)]
    if not any(text.strip() for text in texts):
        raise DataError(f"{path} holds no text")
    return texts


def text_of(path, number, row, name="text", needed=True):
    """A row's text by the name of its column; None where it is not there and not ``needed``."""
    value = row.get(name)
    if value is None and not needed:
        return None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{path}:{number}: {name!r} must be a text, not {value!r}")
    return value


def _text(path, number, row):
    if not isinstance(row.get("text"), str):
        wanted = '{"text": "..."}' if path.suffix == ".jsonl" else 'a column "text"'
        raise DataError(f"{path}:{number}: expected {wanted}, not {row!r:.80}")
    return row["text"]


def _raw_lines(path, odd_endings):
    """Lines with their ends. Python's own text files end lines at \\n, \\r\\n and \\r alone, where
    str.splitlines() has eight more characters."""
    seen = None  # whether lines before this one ended at a lone \r
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise DataError(f"{path}:{number}: a NUL character; is the file UTF-16?")
                if odd_endings and line[-1] in "\r\n":
                    lone = line[-1] == "\r"
                    if seen not in (None, lone):
                        odd_endings = False  # once is enough
                        _warn(f"{path}:{number}: a lone carriage return ends a line in one place, "
                              "a newline in another: both are taken as line ends")  # fmt: skip
                    seen = lone
                yield line
    except UnicodeDecodeError:
        raise _not_utf8(path) from None


def _not_utf8(path):
    """The first byte that is wrong: the decoder, which sees a part of the file, cannot say."""
    with open(path, "rb") as file:
        begin, number = 0, 1
        for line in file:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                number += len((line[: error.start] + b"?").splitlines()) - 1
                return DataError(f"{path} is not UTF-8: byte {begin + error.start}, in line "
                                 f"{number}: {error.reason}")  # fmt: skip
            begin, number = begin + len(line), number + len(line.splitlines())
    return DataError(f"{path} changed while it was read")


def _jsonl(path):
    for number, line in enumerate(iter_lines(path), 1):
        if not line.strip():
            yield number, None
            continue
        try:
            row = _json(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: must be a JSON object")
        yield number, row


def _json(text):
    """Stricter than json: of a key that is there twice, neither may win; and half of a surrogate
    pair is no character."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half of a surrogate pair: {error.reason}") from error
    return value


def _object(pairs):
    if twice := _twice(key for key, _ in pairs):
        raise ValueError(f"the key {twice[0]!r} is there twice")
    return dict(pairs)


def _twice(names):
    return [name for name, count in collections.Counter(names).items() if count > 1]


def _table(path):
    """Rows of CSV or TSV: (the row's first line, the row), None for a blank line."""
    options = {"delimiter": ",", "strict": True}
    if path.suffix == ".tsv":
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(_raw_lines(path, odd_endings=path.suffix == ".tsv"), **options)
    header, number, before = None, 1, csv.field_size_limit(LONGEST_FIELD)
    try:
        for values in reader:
            if _blank(values, header):
                yield number, None
            elif header is None:
                header = values
                if twice := _twice(header):
                    raise DataError(f"{path}:{number}: the column {twice[0]!r} is there twice")
            elif len(values) != len(header):
                raise DataError(
                    f"{path}:{number}: not the header's {len(header)} columns, but {len(values)}"
                )
            else:
                yield number, dict(zip(header, values, strict=True))
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{number}: {error}") from error
    finally:
        csv.field_size_limit(before)


def _blank(values, header):
    """Of one column, a quoted "" is a row; of several, spaces alone are none."""
    alone = header is not None and len(header) == 1
    return not values or (len(values) == 1 and not alone and not values[0].strip())


def _counting_blanks(path, rows):
    blank = []
    for number, row in rows:
        if row is None:
            blank.append(number)
        else:
            yield number, row
    if blank:
        lines = "1 blank line is" if len(blank) == 1 else f"{len(blank)} blank lines are"
        _warn(f"{path}: {lines} left out, the first in line {blank[0]}")


def _warn(message):
    warnings.warn(message, stacklevel=3)
