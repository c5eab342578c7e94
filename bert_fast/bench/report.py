"""Rows as a table, JSON and plots; and what moved between two JSON files."""

import contextlib
import itertools
import json
import platform
import statistics
import subprocess
from datetime import date
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import bert_fast
from bert_fast.files import atomic_path

OURS = "bert_fast"


def environment(device="cpu"):
    """The machine and everything whose version could change a result."""
    facts = {"device": _processor(), "threads": torch.get_num_threads()}
    with contextlib.suppress(ImportError):
        from bert_fast import _C

        facts["cpu kernels"] = _C.cpu_isa() + (" + AMX" if _C.linear_available() else "")
    if device == "cuda":
        facts |= {
            "device": torch.cuda.get_device_name(),
            "compute capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    facts |= {"bert_fast": bert_fast.__version__, "torch": torch.__version__}
    for package in ("triton", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[package] = metadata.version(package)
    root = Path(bert_fast.__file__).resolve().parent.parent
    if (root / ".git").exists():
        facts["commit"] = _said("git", "-C", str(root), "describe", "--always", "--dirty")
    return facts | {"python": platform.python_version(), "date": date.today().isoformat()}


def _processor():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def title(facts):
    return ", ".join(f"{name}: {value}" for name, value in facts.items())


def table(row):
    """A row's contestants, ours first; refused and absent ones with their reasons."""
    shown = Table(title=row["work"], title_justify="left")
    for column in ("", "ms", "spread", "time / ours", "rate", "% of possible", "error"):
        shown.add_column(column, justify="left" if not column else "right")
    ours = row["results"].get(OURS, {}).get("ms")
    for name, result in row["results"].items():
        if "refused" in result:
            shown.add_row(name, "[red]refused[/red]", *[""] * 5, end_section=True)
            shown.add_row(f"  {result['refused']}", *[""] * 6)
            continue
        low, high = result["spread"]
        ms = result["ms"]
        shown.add_row(
            name, f"{ms:.3f}", f"{low:.3f} - {high:.3f}", f"{ms / ours:.2f}" if ours else "",
            _rate(row, name, ms), f"{100 * result['possible']:.0f}" if "possible" in result else "",
            f"{result['error']:.2f}" if "error" in result else "",
        )  # fmt: skip
    if row["kind"] == "train":
        peaks = {
            name: result["peak_bytes"] for name, result in row["results"].items()
            if result.get("peak_bytes") and name not in row["ceilings"]
        }  # fmt: skip
        shown.caption = "peak memory beyond what was there before: " + ", ".join(
            f"{name} {size / 2**20:,.0f} MiB" for name, size in peaks.items()
        )
    return shown


def _rate(row, name, ms):
    if name.startswith("copy"):
        return f"{row['bytes'] / ms / 1e6:,.0f} GB/s"
    if row["tokens"] and row["kind"] in ("layer", "model", "train"):
        return f"{row['tokens'] / ms * 1e3:,.0f} tokens/s"
    if row["flops"]:
        return f"{row['flops'] / ms / 1e6:,.0f} GFLOP/s"
    return f"{row['bytes'] / ms / 1e6:,.0f} GB/s"


def absences(rows):
    """name -> reason, of those that no row has; differing reasons keep their work's kind."""
    present = {name for row in rows for name in row["results"]}
    reasons = {}
    for row in rows:
        for name, reason in row["absent"].items():
            label = f"{name} ({row['work']})" if name in present else name
            reasons.setdefault(label, reason)
    return reasons


def noise_line(noise):
    line = (
        f"Spreads: {noise['spread']:.0%} of a time in the middle, {noise['largest_spread']:.0%} at "
        f"most; the machine's own ceilings moved by {noise['drift']:.0%} during the run."
    )
    if noise["too_noisy"]:
        line += (
            " [bold]This machine is too noisy[/bold] for smaller differences: stop other programs, "
            "or measure longer (--seconds)."
        )
    return line


def write(path, result):
    """JSON, whole or not at all."""
    with atomic_path(path) as scratch:
        Path(scratch).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def read(path):
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = {row["work"]: row["results"] for row in result["rows"]}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of bert-fast bench: {error!r}") from error
    return result, rows


# ------------------------------------------------------------------------------------------------
# What moved
# ------------------------------------------------------------------------------------------------


def machine_moved(old, new):
    """By what factor a row's other contestants moved together: the machine, not our code. 1 where
    there are fewer than three to tell by."""
    ratios = [
        new[name]["ms"] / old[name]["ms"] for name in old
        if not name.startswith(OURS) and "ms" in old[name] and "ms" in new.get(name, {})
    ]  # fmt: skip
    return statistics.median(ratios) if len(ratios) >= 3 else 1.0


def moved(old, new, machine=1.0):
    """-1, 0 or 1: faster, the same, slower. A time moved where, the machine's own movement taken
    off, the distance of the medians is more than both spreads (halved, for they are two-sided)."""
    allowed = sum((r["spread"][1] - r["spread"][0]) / r["ms"] / 2 for r in (old, new))
    change = new["ms"] / old["ms"] / machine - 1
    return 0 if abs(change) <= allowed else 1 if change > 0 else -1


def compare(old_path, new_path, console=None):
    """Prints what both files measured and how it moved; returns the moved (work, name, ratio)."""
    console = console or Console()
    (old, old_rows), (new, new_rows) = read(old_path), read(new_path)
    for name in ("device", "torch", "bert_fast"):
        a, b = (result["environment"].get(name) for result in (old, new))
        if a != b:
            console.print(f"[yellow]{name} differs: {a} and {b}[/yellow]")
    shown = Table("", "old ms", "new ms", "new / old", "less the machine's", "",
                  title=f"{old_path} and {new_path}")  # fmt: skip
    changes = []
    for work in [work for work in old_rows if work in new_rows]:
        machine = machine_moved(old_rows[work], new_rows[work])
        shown.add_section()
        for name, before in old_rows[work].items():
            after = new_rows[work].get(name, {})
            if "ms" not in before or "ms" not in after:
                continue
            ratio = after["ms"] / before["ms"]
            direction = moved(before, after, machine)
            if direction:
                changes.append((work, name, ratio / machine))
            verdict = {0: "within the spread", 1: "[red]slower[/red]", -1: "[green]faster[/green]"}
            shown.add_row(
                f"{work}: {name}", f"{before['ms']:.3f}", f"{after['ms']:.3f}", f"{ratio:.2f}",
                f"{ratio / machine:.2f}", verdict[direction],
            )  # fmt: skip
    console.print(shown)
    for result, rows, others, path in (
        (old, old_rows, new_rows, old_path),
        (new, new_rows, old_rows, new_path),
    ):
        if alone := rows.keys() - others.keys():
            console.print(f"in {path} alone: {'; '.join(sorted(alone))}")
        if result.get("noise", {}).get("too_noisy"):
            console.print(f"[yellow]{path}: the machine was too noisy when it was made[/yellow]")
    for name, before in old.get("ceilings", {}).items():
        after = new.get("ceilings", {}).get(name)
        if after and abs(after / before - 1) > 0.05:
            console.print(
                f"[yellow]The machine itself moved: {name} {before:,.0f} and {after:,.0f}[/yellow]"
            )
    return changes


# ------------------------------------------------------------------------------------------------
# Plots
# ------------------------------------------------------------------------------------------------


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_rows(rows, path):
    """One panel of horizontal bars a row, as a PNG."""
    plt = _pyplot()
    rows = [row for row in rows if any("ms" in r for r in row["results"].values())]
    heights = [0.8 + 0.26 * len(row["results"]) for row in rows]
    figure, panels = plt.subplots(
        len(rows), figsize=(8, sum(heights)), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axes, row in zip(panels[:, 0], rows, strict=True):
        timed = {name: r for name, r in row["results"].items() if "ms" in r}
        names, ms = list(timed), [r["ms"] for r in timed.values()]
        lows, highs = zip(*(result["spread"] for result in timed.values()), strict=True)
        errors = [[m - low for m, low in zip(ms, lows, strict=True)],
                  [high - m for m, high in zip(ms, highs, strict=True)]]  # fmt: skip
        colors = [
            "#d9480f" if n == OURS else "#dfe3ea" if n in row["ceilings"] else "#9aa5b8"
            for n in names
        ]
        bars = axes.barh(names, ms, xerr=errors, color=colors, ecolor="#495057")
        axes.bar_label(bars, [f"{m:.3g} ms" for m in ms], padding=4, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(row["work"], fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_sweep(axis, rows, path):
    """Time over the swept quantity, a line a contestant; against real tokens where they vary."""
    plt = _pyplot()
    varied = len({row["tokens"] for row in rows}) > 1
    figure, panels = plt.subplots(
        1, 1 + varied, figsize=(6 * (1 + varied), 4), squeeze=False, layout="constrained"
    )
    dashes = itertools.cycle(["--", ":"])
    for name in dict.fromkeys(name for row in rows for name in row["results"]):
        points = [(row, row["results"].get(name, {}).get("ms")) for row in rows]
        points = [(row, ms) for row, ms in points if ms is not None]
        style = {"color": "#d9480f", "linewidth": 2.5} if name == OURS else {}
        if any(name in row["ceilings"] for row in rows):
            style = {"color": "#868e96", "linestyle": next(dashes)}
        style |= {"label": name, "marker": "o", "markersize": 3}
        ms = [ms for _, ms in points]
        panels[0, 0].plot([row["x"] for row, _ in points], ms, **style)
        if varied:
            panels[0, 1].plot([row["tokens"] for row, _ in points], ms, **style)
    panels[0, 0].set(yscale="log", xlabel=axis, ylabel="ms")
    swept = [row["x"] for row in rows]
    if min(swept) > 0:
        panels[0, 0].set_xscale("log")
    panels[0, 0].set_xticks(swept, [f"{x:g}" for x in swept])
    panels[0, 0].minorticks_off()
    figure.suptitle(f"over {axis}: {rows[0]['work']} and on", fontsize=9)
    if varied:
        panels[0, 1].set(xlabel="real tokens", ylabel="ms", xlim=(0, None), ylim=(0, None))
    panels[0, 0].legend(fontsize=8, frameon=False)
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure, path):
    plt = _pyplot()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def linearity(points):
    """Of [(tokens, ms)]: the least-squares line ms = a + b tokens as (a, b), and the largest
    relative distance of a point from it."""
    tokens, ms = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
    weights = 1 / ms  # distances count relative to the time
    design = torch.stack([torch.ones_like(tokens), tokens], dim=1) * weights[:, None]
    intercept, slope = torch.linalg.lstsq(design, (ms * weights)[:, None]).solution[:, 0].tolist()
    off = ((intercept + slope * tokens) / ms - 1).abs().max().item()
    return intercept, slope, off
