"""Correctness before speed: a work's contestants are checked, then timed, in one row."""

import contextlib
import functools
import io
import logging
import math
import warnings

import torch

from bert_fast.bench import quality, timing
from bert_fast.bench.peers import InFloat32
from bert_fast.bench.works import LOW

# The allowance, as a multiple of PyTorch's own error: in 16 bits as in the tests (FlashAttention's
# too), for outputs and gradients. In float32 the order of a sum alone moves an error several times
# (torch.compile's bias gradients: 3.8), and what must not pass, a cheaper format, is hundreds off.
ALLOWED = {torch.float32: (10, 10), torch.bfloat16: (2, 3), torch.float16: (2, 3)}
NOISY = 0.15  # a spread or drift above this share of a time is called too noisy
BLOCKS = 4


def relative_errors(results, truth, allowed):
    """For each tensor its root mean square error as a multiple of PyTorch's in the same dtype (of
    one rounding, where PyTorch's is smaller); infinite where shapes differ or numbers are not."""
    if len(results) != len(truth):
        return [math.inf]
    ratios = []
    for ours, exact, eager in zip(results, truth, allowed, strict=True):
        if ours.shape != exact.shape:
            return [math.inf]
        eps = torch.finfo(eager.dtype).eps
        ours, exact, eager = (t.detach().double().cpu() for t in (ours, exact, eager))
        floor = eps * exact.square().mean().sqrt()
        error, own = ((t - exact).square().mean().sqrt() for t in (ours, eager))
        ratio = (error / torch.maximum(own, floor)).item()
        ratios.append(ratio if math.isfinite(ratio) else math.inf)
    return ratios


def refusal(ratios, work):
    """Why a result is not good enough to be timed, or None."""
    for i, ratio in enumerate(ratios):
        limit = max(ALLOWED[work.dtype][i > 0], work.ratio)
        if not ratio <= limit:
            what = "its result" if i == 0 else f"its gradient {i}"
            return f"wrong: {what} errs {ratio:.3g} times as much as PyTorch's; {limit} is allowed"
    return None


def judged(found, truth, allowed, peer, work):
    """What is said of a result: {"error": times PyTorch's}, of a model in a cheaper dtype
    {"cosine": to float32}, or {"refused": reason}."""
    figures, reason = {}, None
    if allowed is not None and not isinstance(peer, InFloat32):
        ratios = relative_errors(found, truth, allowed)
        figures["error"], reason = max(ratios), refusal(ratios, work)
    if work.kind == "model" and work.dtype in LOW:
        if peer.own_precision:
            reason = None
        own = torch.float32 if isinstance(peer, InFloat32) else work.dtype
        reason = reason or quality.refusal(found[0], truth[0], own)
        if reason is None:
            figures["cosine"] = quality.cosines(found[0], truth[0])
    return figures if reason is None else {"refused": reason}


def measure(work, who, seconds=10.0, rounds=None, blocks=BLOCKS):
    """One row: {"work", "results", "absent"}. ``results``: name -> what was measured of it, or
    {"refused": reason} where its result was wrong; ``absent``: name -> why it was not there.

    The rounds are cut into ``blocks``, and inputs and models are made anew for each: where memory
    happens to lie moves a time by more than its rounds differ."""
    with _stream(work.device):
        clock = timing.clock(work.device, work.pause, work.graphs)
        contestants, results, absent = _checked(work, who, clock)
        seconds, rounds = seconds / blocks, rounds and -(-rounds // blocks)
        times = {name: [] for name in contestants}
        for block in range(blocks):
            for name, contestant in contestants.items():
                _named(name, work, contestant.prepare, work, clock, again=block > 0)
            samplers = {
                name: functools.partial(_named, name, work, c.sample)
                for name, c in contestants.items()
            }
            least = max(3, timing.LEAST_ROUNDS // blocks)
            for name, ms in timing.interleaved(samplers, seconds, rounds, least).items():
                times[name].append(ms)
        for name, contestant in contestants.items():
            measured = _named(name, work, contestant.measured, work)
            results[name] |= timing.summary(times[name]) | measured
    ceilings = [c.peer.name for c in contestants.values() if c.peer.ceiling]
    possible = _possible(results, ceilings)
    for name in contestants:
        if possible and name not in ceilings:
            results[name]["possible"] = possible / results[name]["ms"]
    return {
        "work": str(work), "kind": work.kind, "tokens": work.tokens, "flops": work.flops,
        "bytes": work.num_bytes, "ceilings": ceilings, "results": results, "absent": absent,
    }  # fmt: skip


def _named(name, work, function, *args, **options):
    """function(*args), of a contestant that was right before: what it raises names it."""
    try:
        return function(*args, **options)
    except Exception as error:
        raise RuntimeError(f"{name} failed on {work}: {_first_line(error)}") from error


class _Contestant:
    """A peer that is here and right, and its calls, made for one block of rounds."""

    def __init__(self, peer, runs):
        self.peer, self.runs = peer, runs

    def prepare(self, work, clock, again):
        if again and not self.peer.slow_to_make:
            self.runs = None  # before the new ones, for a model may fill the memory
            self.runs = _make(self.peer, work, clock)
        elif again:
            return
        backward = work.backward and not self.peer.ceiling
        self.calls = [run.call(backward) for run in self.runs]
        with quiet():
            self.sample, self.method = clock.sampler(self.calls)

    def measured(self, work):
        """What is not a matter of rounds."""
        found = {"method": self.method}
        if work.device == "cuda":
            found["host_us"] = timing.host_microseconds(self.calls)
        if work.kind == "train":
            found["peak_bytes"] = timing.peak_memory(self.calls[0], work.device)
        return found


def _make(peer, work, clock):
    copies = clock.copies(work.num_bytes or 1 << 40)
    with quiet():
        return [getattr(peer, work.kind)(work, work.inputs(number)) for number in range(copies)]


def _checked(work, who, clock):
    """Those whose result is right, by name; results with the others' refusals; and absences."""
    truth, allowed = work.truth(), work.allowed()
    contestants, results, absent = {}, {}, {}
    for peer in who:
        if getattr(peer, work.kind, None) is None:
            continue
        if (reason := peer.why_absent(work)) is not None:
            absent[peer.name] = reason
            continue
        try:
            contestant = _Contestant(peer, _make(peer, work, clock))
            results[peer.name] = {}
            if not peer.ceiling:
                with quiet():
                    found = contestant.runs[0].results(work.backward)
                results[peer.name] = judged(found, truth, allowed, peer, work)
                if "refused" in results[peer.name]:
                    continue
            contestant.prepare(work, clock, again=False)
        except Exception as error:  # whatever another package raises, the others are measured
            results.pop(peer.name, None)
            absent[peer.name] = _first_line(error)
            continue
        contestants[peer.name] = contestant
    return contestants, results, absent


def _possible(results, ceilings):
    """The least time that the measured ceilings allow: the slower of moving the bytes and doing the
    products (by the faster of the ways to do them)."""
    products = [results[name]["ms"] for name in ceilings if name.startswith("GEMMs")]
    moves = [results[name]["ms"] for name in ceilings if not name.startswith("GEMMs")]
    return max([min(products, default=0.0), *moves])


def noise(rows, before, after):
    """How far times on this machine can be trusted: the middle and the largest relative spread of
    all contestants, and how far the ceilings moved from the run's beginning to its end."""
    spreads = sorted(
        (r["spread"][1] - r["spread"][0]) / r["ms"]
        for row in rows for r in row["results"].values() if "ms" in r
    )  # fmt: skip
    drift = max((abs(after[k] / before[k] - 1) for k in before), default=0.0)
    median, largest = (spreads[len(spreads) // 2], spreads[-1]) if spreads else (0.0, 0.0)
    too_noisy = max(median, drift) > NOISY
    return {"spread": median, "largest_spread": largest, "drift": drift, "too_noisy": too_noisy}


def ceilings(device, dtype, quick=False):
    """The machine's own rates, by the same clock: {"copy GB/s": ..., "matmul GFLOP/s": ...}."""
    size, side = ((64 << 20), 1024) if quick else ((256 << 20), 2048)
    if device == "cuda":
        size, side = 1 << 30, 8192
    with _stream(device):
        clock = timing.clock(device)
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        calls = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=out)}
        samplers = {name: clock.sampler([call])[0] for name, call in calls.items()}
        times = timing.interleaved(samplers, 1.0)
        ms = {name: timing.summary([some])["ms"] for name, some in times.items()}
    return {
        "copy GB/s": 2 * size / ms["copy"] / 1e6,
        "matmul GFLOP/s": 2 * side**3 / ms["matmul"] / 1e6,
    }


@contextlib.contextmanager
def _stream(device):
    """On a GPU all work is made and run on one side stream: autograd runs a backward where its
    forward ran, and the default stream cannot be captured in a graph."""
    with torch.no_grad():
        if device != "cuda":
            yield
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)


@contextlib.contextmanager
def quiet():
    """Exporters and converters talk; a table is being printed."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _first_line(error):
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
