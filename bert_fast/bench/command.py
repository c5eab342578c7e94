"""``bert-fast bench``: the levels, their options, and what runs when none is given."""

from pathlib import Path

import torch
from rich.console import Console

from bert_fast.backends import resolve_device
from bert_fast.bench import changes, host, lengths, plots, protocol_command, report, works
from bert_fast.bench.run import BLOCKS, ceilings, measure, noise
from bert_fast.bench.selection import SWEEPS, chosen_peers, with_float32, works_of
from bert_fast.extras import can_draw

LEVELS = {
    "op": "attention, layer-norm, gelu, linear + gelu: forward and backward",
    "layer": "one encoder layer: forward and backward",
    "model": "whole models: latency at batch 1, throughput",
    "train": "a training step: time, tokens/s, peak memory",
    "sweep": "how cost grows with sequence length, batch, padding or width",
}


def add_parser(commands):
    """Adds ``bench`` and its levels to the command line's subparsers."""
    bench = commands.add_parser(
        "bench",
        help="Time kernels and models beside their peers.",
        description="Time kernels and models beside their peers, on this machine, in one run.",
    )
    protocol_command.add_options(bench)
    bench.set_defaults(function=protocol_command.run)
    levels = bench.add_subparsers(dest="level")
    for level, text in LEVELS.items():
        sub = levels.add_parser(level, help=text, description=text)
        sub.set_defaults(function=run)
        add = sub.add_argument
        if level == "op":
            add("--ops", nargs="+", choices=works.OPS, default=list(works.OPS),
                help="which ops (default: all)")  # fmt: skip
            add("--rows", type=int, help="rows of layer_norm, gelu and linear_gelu")
            add("--width", type=int, help="hidden size (default: that of each of --models)")
            add("--head-dim", type=int, default=64, help="attention's head size (default 64)")
            add("--causal", action="store_true", help="attention with a causal mask")
            add("--dropout", type=float, default=0.0, help="attention's dropout (default 0)")
        if level == "sweep":
            add("over", choices=SWEEPS, help="what is varied")
        if level in ("op", "layer"):
            add("--directions", nargs="+", choices=("forward", "backward"),
                default=["forward", "backward"], help="default: both")  # fmt: skip
        add("--models", nargs="+", metavar="MODEL", default=None,
            help=f"{', '.join(works.MODELS)}, or directories of checkpoints")  # fmt: skip
        add("--batch", type=int, nargs="+", help="sequences per batch")
        add("--seqlen", type=int, nargs="+", help="the longest sequence")
        add("--lengths", choices=lengths.DISTRIBUTIONS, help="full: no padding; uniform: drawn "
            "around --share; reviews, plots: as real film reviews or plots have them")  # fmt: skip
        add("--share", type=float, default=0.65,
            help="share of real tokens with --lengths uniform (default 0.65)")  # fmt: skip
        add("--order", choices=lengths.ORDERS, default="random",
            help="how real texts are batched (default random)")  # fmt: skip
        add("--batches", type=int, default=1,
            help="batches per call, with real lengths (default 1)")  # fmt: skip
        add("--dtype", nargs="+", choices=works.DTYPES,
            help="default: float32, on a GPU bfloat16; int8 is of models on the CPU")  # fmt: skip
        add("--device", choices=("auto", "cpu", "cuda"), default="auto",
            help="default: the GPU where there is one")  # fmt: skip
        add("--backends", nargs="+", metavar="BACKEND",
            help="our backends to measure (default: auto, and each that runs here)")  # fmt: skip
        add("--peers", nargs="*", metavar="PEER", help="by name or part of a name (default: all)")
        add("--rounds", type=int, help="timed rounds (default: as many as fit in --seconds)")
        add("--seconds", type=float, default=None,
            help="seconds of timing per row (default 8, with --quick 3)")  # fmt: skip
        add("--quick", action="store_true", help="one small row of each kind, the quickest peers")
        add("--json", help="write the results to this file, after every row")
        add("--csv", help="write the results to this file as CSV, one line per contestant")
        add("--plot", help="draw the results to this PNG file")
    host.add_parser(levels)
    sub = levels.add_parser("compare", help="what changed between two --json files")
    sub.set_defaults(function=run_compare)
    sub.add_argument("old", help="the earlier file")
    sub.add_argument("new", help="the later file")


def _no_protocol(args):
    if given := protocol_command.given(args):
        raise ValueError(
            f"{', '.join(given)} before {args.level!r}: a protocol takes no level, and a level's "
            "options stand behind it"
        )


def run_compare(args):
    """What moved beyond the spread between two results."""
    _no_protocol(args)
    for path in (args.old, args.new):
        if not Path(path).is_file():
            raise ValueError(f"there is no file {path}")
    if not changes.compare(args.old, args.new):
        print("Nothing moved beyond the spread.")


def run(args):
    """Measures a level. Returns 1 where a result of ours was wrong."""
    _no_protocol(args)
    args.device = resolve_device(args.device)
    for path in filter(None, (args.json, args.csv, args.plot)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    listed = list(works_of(args))
    who = chosen_peers(args)
    seconds = args.seconds or (3.0 if args.quick else 8.0)
    console = Console(width=None if Console().is_terminal else 120)
    facts = report.environment(args.device)
    console.print(report.title(facts))
    if facts.get("dirty"):
        console.print(
            "[yellow]The working tree has changes that no commit holds: "
            "these results name no version[/yellow]"
        )
    dtype = listed[0][1].dtype
    dtype = torch.float32 if dtype == torch.int8 else dtype
    before = ceilings(args.device, dtype, args.quick)
    console.print(", ".join(f"{name}: {value:,.0f}" for name, value in before.items()))
    result = {"level": args.level, "environment": facts, "ceilings": before, "rows": []}
    blocks = BLOCKS if args.level in ("op", "layer") or not args.quick else 2
    while listed:
        x, work = listed.pop(0)  # its checkpoint and tensors end with it
        row = measure(work, with_float32(who, work), seconds, args.rounds, blocks)
        if x is not None:
            row["x"] = x
        result["rows"].append(row)
        console.print(report.table(row))
        if args.json:  # as soon as it exists: time may run out
            report.write(args.json, result)
    for name, reason in report.absences(result["rows"]).items():
        console.print(f"not here: {name}: {reason}", highlight=False)
    result["noise"] = noise(result["rows"], before, ceilings(args.device, dtype, args.quick))
    console.print(report.noise_line(result["noise"]))
    if args.level == "sweep":
        for name, (start, slope, off) in lines(args.over, result["rows"]).items():
            console.print(
                f"{name}: {start:.2f} ms + {slope * 1e3:.2f} ms per 1,000 real tokens; "
                f"no point further than {off:.0%} from that line"
            )
    if args.json:
        report.write(args.json, result)
    if args.csv:
        report.write_csv(args.csv, result["rows"])
    if args.plot and can_draw(args.plot):
        if args.level == "sweep":
            plots.plot_sweep(args.over, result["rows"], args.plot)
        else:
            plots.plot_rows(result["rows"], args.plot)
        console.print(f"Plot: {args.plot}")
    ours = [row["results"].get(report.OURS, {}) for row in result["rows"]]
    return 1 if any("refused" in found for found in ours) else 0


def lines(over, rows):
    """name -> the line through its times over real tokens, where length and width stay."""
    if over not in ("batch", "padding"):
        return {}
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row["results"]):
        timed = [(row["tokens"], row["results"].get(name, {}).get("ms")) for row in rows]
        timed = [point for point in timed if point[1] is not None]
        if len(timed) > 2:
            found[name] = plots.linearity(timed)
    return found
