"""The JSON files beside a checkpoint's weights."""

import json

from bert_fast.models.checkpoint import CheckpointError


def read_json(path, default=None):
    """The file's value, or ``default`` (else an empty dict) where there is no file."""
    if not path.is_file():
        return {} if default is None else default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not a JSON file: {error}") from error
