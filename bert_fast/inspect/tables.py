"""What was found, as tables and as JSON."""

import dataclasses

from rich import box
from rich.table import Table

from bert_fast.bench.works import describe
from bert_fast.inspect.chips import CHIPS
from bert_fast.inspect.counts import SHOWN
from bert_fast.inspect.layer import layer

CEILING = "ceiling from counts, not measured"


def table(compiled):
    """A rich table of what :func:`inspect` gave: registers, memory, peaks."""
    shown = Table(title="kernels, as compiled")
    for column in ("work", "kernel", "chip", "warps", "registers", "shared", "spills", "CTAs / SM",
                   "products", "load, bits", "FLOPs", "bytes", "possible, us"):  # fmt: skip
        shown.add_column(column, justify="left" if column in ("work", "kernel") else "right")
    last = None
    for c in compiled:
        if c.work != last:
            shown.add_section()
        chip = f"{c.chip} ({CHIPS[c.chip].name})"
        shown.add_row(
            c.work if c.work != last else "", c.kernel, chip, f"{c.num_warps}", f"{c.registers}",
            "at launch" if c.shared is None else f"{c.shared:,}", f"{c.spills}", f"{c.ctas}",
            c.products, f"{c.widest_load}", f"{c.flops:.3g}", f"{c.bytes:.3g}",
            f"{c.possible_us:.1f}",
        )  # fmt: skip
        last = c.work
    return shown


def costs(compiled):
    """A rich table of the main loops: instructions by pipe, what binds, the speed that they allow
    at most; and what the launch loses to ragged ends and to its last CTAs."""
    shown = Table(title=f"main loops: {CEILING}", box=box.SIMPLE, padding=(0, 0, 0, 1))
    for column in ("work", "kernel", "chip", "loop", "/ element", *SHOWN, "repeated", "bytes, x",
                   "in flight", "binds", "cycles", "ceiling", "serial", "ragged", "idle",
                   "best, us"):  # fmt: skip
        words = column in ("work", "kernel")
        shown.add_column(column, justify="left" if words else "right", no_wrap=column != "work")
    last = None
    for c in (c for c in compiled if c.counts):
        if c.work != last:
            shown.add_section()
        n, unit = c.counts, "TFLOP/s" if c.counts.tile.flops else "TB/s"
        shown.add_row(
            c.work if c.work != last else "", c.kernel, f"{c.chip}",
            f"{n.instructions}{'' if n.loop else ' (all)'}", f"{n.an_element:.1f}",
            *(f"{n.pipes[name]}" for name in SHOWN),
            f"{n.repeated:.2g} x" if n.repeated > 1 else "", _number(c.over_least, ".2f"),
            _number(c.in_flight, ","), n.binds,
            f"{n.cycles_a_tile:,.0f}", f"{n.ceiling():,.{0 if n.tile.flops else 2}f} {unit}",
            f"{n.ceiling(n.serial):,.0f}" if n.tile.flops else "",
            _number(c.grid and c.grid.ragged, ".0%"), _number(c.grid and c.grid.idle, ".0%"),
            _number(c.best_us, ".1f"),
        )  # fmt: skip
        last = c.work
    return shown


def layer_table(chip, lengths):
    """A rich table of a BERT-base layer's time at best, inference and backward, for a batch of
    sequences of these lengths."""
    work = f"a layer of BERT-base, {describe(lengths)}, bfloat16, on {CHIPS[chip].name}"
    shown = Table(title=f"{work}:\n{CEILING}")
    for column in ("step", "kernel", "ragged", "idle", "best, us"):
        shown.add_column(column, justify="left" if column in ("step", "kernel") else "right")
    for backward in (False, True):
        steps = layer(chip, lengths, backward=backward)
        for s in steps:
            shown.add_row(s.name, s.kernel, _number(s.ragged, ".0%"), _number(s.idle, ".0%"),
                          f"{s.us:.1f}")  # fmt: skip
        name = "backward" if backward else "forward, in inference"
        shown.add_row(name, "", "", "", f"{sum(s.us for s in steps):.1f}", end_section=True)
    return shown


def _number(value, form):
    return "" if value is None else format(value, form)


def row(c):
    """What was compiled, as JSON takes it."""
    found = {field.name: getattr(c, field.name) for field in dataclasses.fields(c)}
    found |= {"ctas": c.ctas, "faults": c.faults(), "counts": None, "grid": None}
    if n := c.counts:
        found["counts"] = dataclasses.asdict(n) | {
            "instructions": n.instructions, "an_element": n.an_element, "repeated": n.repeated,
            "binds": n.binds, "cycles_a_tile": n.cycles_a_tile, "serial_cycles": n.serial,
            "ceiling": n.ceiling(), "serial": n.ceiling(n.serial), "over_least": c.over_least,
            "in_flight": c.in_flight,
        }  # fmt: skip
    if c.grid:
        found["grid"] = {"ragged": c.grid.ragged, "idle": c.grid.idle, "best_us": c.best_us}
    return found | {"said": CEILING}
