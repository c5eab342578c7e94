"""Where files go, and how: whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and what is wrong with it."""


def cache_directory():
    """Where what was fetched or found out stays: BERT_FAST_CACHE, or ~/.cache/bert_fast."""
    path = Path(os.environ.get("BERT_FAST_CACHE") or Path.home() / ".cache" / "bert_fast")
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def atomic_path(target):
    """A path beside ``target`` to write to; it replaces ``target`` if the block succeeds, and goes
    if it fails, so that no reader ever sees half a file."""
    target = Path(target)
    handle, path = tempfile.mkstemp(
        prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent
    )
    os.close(handle)
    try:
        yield path
        os.chmod(path, 0o666 & ~_umask())
        os.replace(path, target)
    except BaseException:
        os.unlink(path)
        raise


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
