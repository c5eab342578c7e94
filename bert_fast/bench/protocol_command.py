"""``bert-fast bench --protocol``: its options, table, JSON and picture."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bert_fast.bench import plots, protocol, quality, report
from bert_fast.extras import can_draw

OPTIONS = ("models", "peers", "samples", "quick", "json", "plot")


def add_options(bench):
    """Adds ``--protocol`` and what belongs to it to ``bert-fast bench`` itself."""
    group = bench.add_argument_group("a published protocol, instead of a level")
    add = group.add_argument
    add("--protocol", choices=("sentence-transformers",),
        help="speed beside quality as sentence-transformers publishes it, on the CPU")  # fmt: skip
    add("--models", nargs="+", dest="protocol_models", metavar="MODEL",
        help=f"{', '.join(protocol.MODELS)}, or directories of checkpoints")  # fmt: skip
    add("--peers", nargs="+", dest="protocol_peers", metavar="PEER",
        help="backends by name or part of a name (default: all)")  # fmt: skip
    add("--samples", type=int, dest="protocol_samples", metavar="N",
        help=f"texts of each length (default {protocol.SAMPLES}, with --quick "
        f"{protocol.QUICK.samples})")  # fmt: skip
    add("--quick", action="store_true", dest="protocol_quick", help="few texts, one model")
    add("--json", dest="protocol_json", help="write the results to this file")
    add("--plot", dest="protocol_plot", help="draw speed against quality to this PNG file")


def given(args):
    """The protocol's options that were given, as they are written."""
    said = {name: getattr(args, f"protocol_{name}", None) for name in OPTIONS}
    found = [
        f"--{name}" for name, value in said.items() if value is not None and value is not False
    ]
    return (["--protocol"] if getattr(args, "protocol", None) else []) + found


def run(args):
    """Measures by the protocol. Returns 1 where a result of ours was wrong.

    Raises:
        ValueError: no protocol was named, or a model or peer is unknown.
    """
    if not args.protocol:
        raise ValueError("say what to measure: op, layer, model, train, sweep, or --protocol")
    plan = protocol.QUICK if args.protocol_quick else protocol.Plan()
    if args.protocol_models:
        plan = replace(plan, models=tuple(args.protocol_models))
    if args.protocol_peers:
        plan = replace(plan, peers=tuple(args.protocol_peers))
    if args.protocol_samples is not None:
        if args.protocol_samples < 1:
            raise ValueError(f"--samples must be at least 1, not {args.protocol_samples}")
        plan = replace(plan, samples=args.protocol_samples)
    for path in filter(None, (args.protocol_json, args.protocol_plot)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if Console().is_terminal else 120)
    facts = report.environment()
    console.print(report.title(facts))
    rows, missing = protocol.run(plan, lambda line: console.print(line, highlight=False))
    summary = protocol.summary(rows)
    console.print(table(rows))
    console.print(medians(summary))
    for row in rows:
        if "refused" in row:
            console.print(
                f"[red]{row['model']}: {row['backend']} is refused[/red]: {row['refused']}"
            )
    for name, reason in missing.items():
        console.print(f"not here: {name}: {reason}", highlight=False)
    if args.protocol_json:
        result = {"protocol": args.protocol, "environment": facts, "plan": vars(plan)}
        whole = {**result, "results": rows, "summary": summary, "absent": missing}
        report.write(args.protocol_json, whole)
    if args.protocol_plot and can_draw(args.protocol_plot):
        plots.plot_quality(summary, args.protocol_plot)
        console.print(f"Plot: {args.protocol_plot}")
    wrong = [row for row in rows if "refused" in row and row["backend"].startswith(report.OURS)]
    return 1 if wrong else 0


def table(rows):
    """Every model and length of texts."""
    shown = Table(title="each backend's best batch size", title_justify="left")
    for column in ("model", "texts", "backend", "texts/s", "batch", "speed-up"):
        shown.add_column(
            column, justify="left" if column in ("model", "texts", "backend") else "right"
        )
    for row in rows:
        if "speedup" in row:
            shown.add_row(
                Path(row["model"]).name, row["texts"], row["backend"],
                f"{row['texts_per_second']:,.1f}", str(row["batch_size"]), f"{row['speedup']:.2f}x",
            )  # fmt: skip
    return shown


def medians(summary):
    """Speed beside quality: what the protocol comes to."""
    shown = Table(title="median over models and texts", title_justify="left")
    for column in ("", "speed-up", "nDCG@10 of float32's", "cosine: mean / 1% / least"):
        shown.add_column(column, justify="right" if column else "left")
    for name, found in summary.items():
        quality_of = f"{found['quality']:.2%}" if "quality" in found else ""
        cosine = quality.shown(found["cosine"]) if "cosine" in found else ""
        shown.add_row(name, f"{found['speedup']:.2f}x", quality_of, cosine)
    return shown
