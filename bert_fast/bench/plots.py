"""Rows and sweeps as pictures."""

import itertools
from pathlib import Path

import torch

from bert_fast.bench.report import OURS


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


def plot_quality(summary, path):
    """Speed-up against quality, a point a backend: further right and higher is better. Backends
    whose quality was not measured are left out."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, found in summary.items():
        if "quality" not in found:
            continue
        color = "#d9480f" if name.startswith(OURS) else "#5c677d"
        point = found["speedup"], 100 * found["quality"]
        axes.scatter(*point, color=color, s=30)
        axes.annotate(name, point, (5, 4), textcoords="offset points", fontsize=8, color=color)
    axes.set(xlabel="times as fast as sentence-transformers in float32",
             ylabel="nDCG@10, % of float32's", xlim=(0, None))  # fmt: skip
    axes.margins(x=0.2, y=0.15)
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
