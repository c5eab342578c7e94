"""One reader of text files for every command: plain lines, CSV and TSV (with a header), JSONL.

UTF-8, with or without a byte-order mark. A line ends at LF, CR LF or CR and nowhere else: a form
feed, U+2028 or NEL is part of a text. No row is merged, split or dropped without a word: one that
cannot be used is named by file and line, blank lines that are left out are counted in a warning.
"""

import csv
import io
import json
import re
import sys
import warnings
from pathlib import Path

ROW_FORMATS = (".csv", ".tsv", ".jsonl")
LINE_END = re.compile("\r\n|\n|\r")


class DataError(ValueError):
    """A row that cannot be used; the message names the file and the line."""


def read_lines(path):
    """The lines of a text file, without their ends; blank ones too. What follows the last end is a
    line if it is not empty."""
    lines = LINE_END.split(_read(path))
    return lines[:-1] if lines[-1] == "" else lines


def read_texts(path):
    """The texts of a file: one per line, a blank line being an empty text; the column "text" of a
    .csv or .tsv file; or each line's "text" of a .jsonl file.

    Raises:
        DataError: naming the file, and the line, that is empty, not UTF-8 or not as expected.
    """
    path = Path(path)
    if path.suffix in ROW_FORMATS:
        texts = [_text(path, number, row) for number, row in read_rows(path)]
    else:
        texts = read_lines(path)
    if not any(text.strip() for text in texts):
        raise DataError(f"{path} holds no text")
    return texts


def read_rows(path):
    """(line number, {column: value}) for each row of a .csv, .tsv or .jsonl file.

    Raises:
        DataError: naming file and line.
    """
    path = Path(path)
    if path.suffix not in ROW_FORMATS:
        raise DataError(f"{path}: the name must end in .csv, .tsv or .jsonl")
    return (_jsonl if path.suffix == ".jsonl" else _table)(path)


def text_of(path, number, row, name="text", needed=True):
    value = row.get(name)
    if value is None and not needed:
        return None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{path}:{number}: {name!r} must be a text, not {value!r}")
    return value


def _text(path, number, row):
    text = row.get("text")
    if not isinstance(text, str):
        raise DataError(f'{path}:{number}: "text" must be a string, not {text!r}')
    return text


def _read(path):
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start}: {error.reason}") from error
    if "\0" in text:
        number = 1 + len(LINE_END.findall(text[: text.index("\0")]))
        raise DataError(f"{path}:{number}: a NUL character: this is no text file, or not UTF-8")
    return text


def _jsonl(path):
    blank, rows = [], []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            blank.append(number)
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: must be a JSON object")
        rows.append((number, row))
    _say_blank(path, blank)
    return rows


def _table(path):
    """Of CSV, whose fields may be quoted and hold line ends; of TSV as GLUE has it, in which a
    quote is a character like others."""
    tabs = path.suffix == ".tsv"
    how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # Its own line ends are kept inside of fields.
    reader = csv.reader(io.StringIO(_read(path), newline=""), **how)
    header, blank, rows, quoted = None, [], [], []
    try:
        for values in reader:
            number = reader.line_num
            if not values:
                blank.append(number)
            elif header is None:
                header = values
                if len(set(header)) < len(header):
                    raise DataError(f"{path}:{number}: a column's name comes twice: {header}")
            elif len(values) != len(header):
                raise DataError(
                    f"{path}:{number}: {len(values)} columns, not the header's {len(header)}"
                )
            else:
                rows.append((number, dict(zip(header, values, strict=True))))
                if tabs and any(len(v) > 1 and v[0] == v[-1] == '"' for v in values):
                    quoted.append(number)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    _say_blank(path, blank)
    if quoted and len(quoted) == len(rows):
        warnings.warn(
            f"{path}:{quoted[0]}: every row has a field in quotes. In a .tsv file they are part of "
            "the text; a table with quoted fields must be .csv",
            stacklevel=3,
        )
    return rows


def _say_blank(path, numbers):
    if numbers:
        some = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        warnings.warn(f"{path}: {len(numbers)} blank lines left out: {some}", stacklevel=4)
