"""One reader of files: CSV and TSV (with a header), JSONL, plain lines. A row that cannot be used
is named by file and line."""

import csv
import json
from pathlib import Path

ROW_FORMATS = (".csv", ".tsv", ".jsonl")


class DataError(ValueError):
    """A row that cannot be used; the message names the file and the line."""


def read_rows(path):
    """(line number, {column: value}) for each row of a .csv, .tsv or .jsonl file.

    Raises:
        DataError: naming file and line.
    """
    path = Path(path)
    if path.suffix not in ROW_FORMATS:
        raise DataError(f"{path}: the name must end in .csv, .tsv or .jsonl")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            yield from (_jsonl if path.suffix == ".jsonl" else _csv)(path, file)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start}: {error.reason}") from error


def _jsonl(path, file):
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: must be a JSON object")
        yield number, row


def _csv(path, file):
    reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}:{reader.line_num}: not the header's {len(reader.fieldnames)} columns"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}") from error


def read_lines(path):
    """Of a text file; a line ends at a newline and nowhere else."""
    try:
        with open(path, encoding="utf-8") as file:
            return [line.rstrip("\n") for line in file]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start}: {error.reason}") from error


def text_of(path, number, row, name="text", needed=True):
    value = row.get(name)
    if value is None and not needed:
        return None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{path}:{number}: {name!r} must be a text, not {value!r}")
    return value
