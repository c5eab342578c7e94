"""Launch settings by search: BERT_FAST_AUTOTUNE=1 times a few and keeps the fastest.

Without it a kernel runs with its table's settings, and no call is ever slowed by a search. With it
the first call of a kind (chip, dtype, sizes, flags) times the table's entry and its candidates, and
writes the fastest to ``tuned.json`` in the cache directory (BERT_FAST_CACHE, or
~/.cache/bert_fast), where later processes find it. Block sizes set the order of sums: two machines,
or two searches, may differ in last bits; one file gives one answer.
"""

import functools
import json
import os
import time

import torch
import triton

from bert_fast.environment import stored
from bert_fast.files import atomic_path, cache_directory

_asked = stored("BERT_FAST_AUTOTUNE")


def run(kernel, settings, search, launch):
    """Runs launch(settings), or launch(the fastest of settings and candidates).

    kernel: its name; settings: a tuple; search: a function, called where there is a search alone,
    of what else the choice depends on (plain numbers and strings) and the candidates; launch: may
    be called many times.
    """
    if is_asked():
        settings = _tuned(kernel, *search(), settings, launch)
    launch(settings)


def is_asked():
    """Whether settings are searched for."""
    return _asked() is not None and os.environ.get("BERT_FAST_AUTOTUNE") == "1"


def _tuned(kernel, kind, candidates, settings, launch):
    key = " ".join(map(str, (kernel, _chip(), *kind)))
    known = _read(_path())
    if key in known:
        return tuple(known[key])
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return settings  # nothing can be timed into a graph
    times = {}
    for candidate in dict.fromkeys([settings, *candidates]):
        try:
            times[candidate] = _milliseconds(functools.partial(launch, candidate))
        except triton.runtime.errors.OutOfResources:
            continue  # more than this chip has
    best = min(times, key=times.get, default=settings)
    _write(_path(), key, best)
    return best


def _milliseconds(call):
    if torch.cuda.is_available():
        return triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median")
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def _chip():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"


def _path():
    return cache_directory() / "tuned.json"


_cached: dict = {}  # path -> (its time stamp, what was in it)


def _read(path):
    try:
        stamp = path.stat().st_mtime_ns
        if _cached.get(path, (None,))[0] != stamp:
            _cached[path] = stamp, json.loads(path.read_text(encoding="utf-8"))
        return _cached[path][1]
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not what BERT_FAST_AUTOTUNE wrote: delete it") from error


def _write(path, key, settings):
    _cached.pop(path, None)
    known = _read(path) | {key: settings}
    with atomic_path(path) as scratch, open(scratch, "w", encoding="utf-8") as file:
        json.dump(known, file, indent=1)
