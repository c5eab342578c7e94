"""Environment variables that every call asks for."""

import functools
import os
from collections.abc import Callable


def stored(name: str) -> Callable[[], str | bytes | None]:
    """A function that gives the variable as the process keeps it, None where it is not set:
    ``os.environ.get`` takes ten times as long to make a string of it."""
    kept = getattr(os.environ, "_data", None)
    if not isinstance(kept, dict):
        return functools.partial(os.environ.get, name)
    return functools.partial(kept.get, os.environ.encodekey(name))
