"""What moved between two JSON files of results."""

import statistics

from rich.console import Console
from rich.table import Table

from bert_fast.bench.report import OURS, read


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
