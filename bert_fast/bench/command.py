"""``bert-fast bench``: the levels, their options, and what runs when none is given."""

import itertools
from pathlib import Path

LEVELS = {
    "op": "attention, layer-norm, gelu, linear + gelu: forward and backward",
    "layer": "one encoder layer: forward and backward",
    "model": "whole models: latency at batch 1, throughput",
    "train": "a training step: time, tokens/s, peak memory",
    "sweep": "how cost grows with sequence length, batch, padding or width",
}
SWEEP_PEERS = ("HF eager", "HF sdpa", "torch.nn.TransformerEncoderLayer")
SWEEPS = {
    "seqlen": (32, 64, 128, 256, 512, 1024, 2048, 4096),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "padding": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "width": (128, 256, 512, 768, 1024, 1536, 2048),
}
SWEEP_TOKENS = 4096  # a batch, where length is swept


def add_parser(commands):
    """Adds ``bench`` and its levels to the command line's subparsers."""
    from bert_fast.bench import lengths, works

    bench = commands.add_parser(
        "bench", help="Time kernels and models beside their peers.", description=__doc__
    )
    levels = bench.add_subparsers(dest="level", required=True)
    for level, text in LEVELS.items():
        sub = levels.add_parser(level, help=text, description=text)
        sub.set_defaults(function=run)
        add = sub.add_argument
        if level == "op":
            add("--ops", nargs="+", choices=works.OPS, default=list(works.OPS))
            add("--rows", type=int, help="of layer_norm, gelu, linear_gelu")
            add("--width", type=int, help="the hidden width (default: each of --models')")
            add("--head-dim", type=int, default=64)
            add("--causal", action="store_true")
            add("--dropout", type=float, default=0.0, help="of attention")
        if level == "sweep":
            add("over", choices=SWEEPS, help="what is varied")
        if level in ("op", "layer"):
            add("--directions", nargs="+", choices=("forward", "backward"),
                default=["forward", "backward"])  # fmt: skip
        add("--models", nargs="+", metavar="MODEL", default=None,
            help=f"{', '.join(works.MODELS)}, or directories of checkpoints")  # fmt: skip
        add("--batch", type=int, nargs="+", help="sequences a batch")
        add("--seqlen", type=int, nargs="+", help="the longest sequence")
        add("--lengths", choices=lengths.DISTRIBUTIONS, help="full; uniform around --share; as "
            "real film reviews or plots have them")  # fmt: skip
        add("--share", type=float, default=0.65, help="of real tokens, if uniform (default 0.65)")
        add("--order", choices=lengths.ORDERS, default="random", help="how real texts are batched")
        add("--batches", type=int, default=1, help="batches a call, drawn anew (real lengths)")
        add("--dtype", nargs="+", choices=works.DTYPES, help="default float32; on a GPU bfloat16")
        add("--device", choices=("cpu", "cuda"), help="default cuda where there is one")
        add("--backends", nargs="+", metavar="BACKEND", help="of ours; default auto and, where "
            "there are several, each")  # fmt: skip
        add("--peers", nargs="*", metavar="PEER", help="by name, or a part of it; default all")
        add("--rounds", type=int, help="default: as many as fit in --seconds")
        add("--seconds", type=float, default=None, help="of timing a row (default 8; quick 3)")
        add("--quick", action="store_true", help="one small row a kind, the quickest peers")
        add("--json", help="write everything here, after every row")
        add("--plot", help="draw the rows to this PNG")
    sub = levels.add_parser("compare", help="what moved between two --json files")
    sub.set_defaults(function=run_compare)
    sub.add_argument("old")
    sub.add_argument("new")


def run_compare(args):
    """What moved beyond the spread between two results."""
    from bert_fast.bench import report

    for path in (args.old, args.new):
        if not Path(path).is_file():
            raise ValueError(f"there is no file {path}")
    if not report.compare(args.old, args.new):
        print("Nothing moved beyond the spread.")


def run(args):
    """Measures a level. Returns 1 where a result of ours was wrong."""
    import torch
    from rich.console import Console

    from bert_fast.bench import report
    from bert_fast.bench.run import BLOCKS, ceilings, measure, noise

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    for path in filter(None, (args.json, args.plot)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    listed = list(works_of(args))
    who = chosen_peers(args)
    seconds = args.seconds or (3.0 if args.quick else 8.0)
    console = Console(width=None if Console().is_terminal else 120)
    facts = report.environment(args.device)
    console.print(report.title(facts))
    dtype = listed[0][1].dtype
    before = ceilings(args.device, dtype, args.quick)
    console.print(", ".join(f"{name}: {value:,.0f}" for name, value in before.items()))
    result = {"level": args.level, "environment": facts, "ceilings": before, "rows": []}
    blocks = BLOCKS if args.level in ("op", "layer") or not args.quick else 2
    while listed:
        x, work = listed.pop(0)  # its checkpoint and tensors end with it
        row = measure(work, who, seconds, args.rounds, blocks)
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
    if args.plot:
        if args.level == "sweep":
            report.plot_sweep(args.over, result["rows"], args.plot)
        else:
            report.plot_rows(result["rows"], args.plot)
        console.print(f"Plot: {args.plot}")
    ours = [row["results"].get(report.OURS, {}) for row in result["rows"]]
    return 1 if any("refused" in found for found in ours) else 0


def lines(over, rows):
    """name -> the line through its times over real tokens, where length and width stay."""
    from bert_fast.bench import report

    if over not in ("batch", "padding"):
        return {}
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row["results"]):
        timed = [(row["tokens"], row["results"].get(name, {}).get("ms")) for row in rows]
        timed = [point for point in timed if point[1] is not None]
        if len(timed) > 2:
            found[name] = report.linearity(timed)
    return found


def chosen_peers(args):
    """Ours, the peers asked for, and the ceilings."""
    from bert_fast.backends import BACKENDS
    from bert_fast.bench.peers import Ours, peers

    everyone = peers(args.device)
    names = [peer.name for peer in everyone if not peer.ceiling]
    wanted = args.peers
    if wanted is None:
        wanted = names
        if args.level == "sweep":
            wanted = SWEEP_PEERS
        elif args.quick:
            slow = ("torch.compile", *(["eager reference"] if args.level != "op" else []))
            wanted = [name for name in names if not name.startswith(slow)]
    else:
        for asked in wanted:
            if not any(asked.lower() in name.lower() for name in names):
                raise ValueError(
                    f"--peers: no peer is called {asked!r}; there are {', '.join(names)}"
                )
        wanted = [n for n in names if any(asked.lower() in n.lower() for asked in wanted)]
    own = [peer for peer in everyone if peer.name.startswith("bert_fast")]
    if args.backends:
        if unknown := set(args.backends) - {*BACKENDS, "auto"}:
            raise ValueError(f"--backends: {', '.join(unknown)}: choose from {', '.join(BACKENDS)}")
        own = [Ours(args.backends[0]), *(Ours(b, name=f"bert_fast {b}") for b in args.backends[1:])]
    others = [peer for peer in everyone if peer.name in wanted and peer not in own]
    others = [peer for peer in others if not peer.name.startswith("bert_fast")]
    return own + others + [peer for peer in everyone if peer.ceiling]


# ------------------------------------------------------------------------------------------------
# What is measured when nothing is said
# ------------------------------------------------------------------------------------------------


def works_of(args):
    """(x, work) in order; x is the swept value, or None."""
    from bert_fast.bench import works

    gpu = args.device == "cuda"
    dtypes = [works.DTYPES[d] for d in args.dtype or (["bfloat16"] if gpu else ["float32"])]
    if args.models:
        for model in args.models:
            if model not in works.MODELS and not (Path(model) / "config.json").is_file():
                raise ValueError(
                    f"--models: {model!r} is neither one of {', '.join(works.MODELS)} nor a "
                    "directory with a config.json"
                )
    make = {"op": _ops, "layer": _layers, "model": _models, "train": _train, "sweep": _sweep}
    for dtype in dtypes:
        yield from make[args.level](args, {"dtype": dtype, "device": args.device}, gpu)


def _lengths(args, batch, seqlen, distribution="uniform", batches=1, share=None):
    from bert_fast.bench import lengths

    share = args.share if share is None else share
    drawn = lengths.draw(args.lengths or distribution, batch, seqlen, share, args.order, batches)
    return tuple(tuple(some) for some in drawn)


def _config(model):
    import bert_fast
    from bert_fast.bench import works

    if model in works.MODELS:
        return bert_fast.BertConfig(**works.MODELS[model])
    return bert_fast.BertConfig.from_json(Path(model) / "config.json")


def _named(model):
    """A model's name, or a checkpoint's directory and the name of that."""
    from bert_fast.bench import works

    if model in works.MODELS:
        return {"name": model}
    return {"name": Path(model).name, "directory": model}


def _ops(args, common, gpu):
    """Attention at BERT's lengths; the row-wise ops at the models' widths. Forward first: it is
    what inference is made of."""
    from bert_fast.bench import works

    models = args.models or (["bert-base", "bert-large"] if gpu else ["bert-base"])
    if args.quick:
        models = models[:1]
    tokens = 16384 if gpu else 1024
    seqlens = args.seqlen or ([128, 256, 512, 1024, 2048] if gpu and not args.quick else [128])
    for direction, op in itertools.product(args.directions, args.ops):
        options = {**common, "backward": direction == "backward"}
        if op == "attention":
            for model, seqlen in itertools.product(models, seqlens):
                width = args.width or _config(model).hidden_size
                for batch in args.batch or [max(1, tokens // seqlen)]:
                    # On a GPU both full, as others publish it, and mixed; else mixed.
                    kinds = ["full", "uniform"] if gpu and not args.lengths else ["uniform"]
                    for kind in kinds:
                        (lengths,) = _lengths(args, batch, seqlen, kind)
                        yield None, works.Attention(
                            **options, lengths=lengths, num_heads=max(1, width // args.head_dim),
                            head_dim=args.head_dim, causal=args.causal, dropout_p=args.dropout,
                        )  # fmt: skip
            continue
        for model in models:
            config = _config(model)
            hidden = args.width or config.hidden_size
            wide = 4 * args.width if args.width else config.intermediate_size
            rows = args.rows or tokens
            if op == "layer_norm":
                yield None, works.LayerNorm(**options, rows=rows, width=hidden)
            elif op == "gelu":
                yield None, works.Gelu(**options, rows=rows, width=wide)
            else:
                yield None, works.LinearGelu(**options, rows=rows, width=hidden, out_width=wide)


def _layers(args, common, gpu):
    from bert_fast.bench import works

    batches = args.batch or ([128] if gpu else [8])
    for direction, model in itertools.product(args.directions, args.models or ["bert-base"]):
        for batch, seqlen in itertools.product(batches, args.seqlen or [128]):
            yield None, works.Layer(
                **common, backward=direction == "backward", **_named(model),
                batches=_lengths(args, batch, seqlen),
            )  # fmt: skip


def _models(args, common, gpu):
    """Batch 1 first (latency), then throughput."""
    from bert_fast.bench import works

    models = args.models or (["minilm-l6"] if args.quick else list(works.MODELS))
    default = [1, 256] if gpu else [1, 32]
    batches = args.batch or ([16] if args.quick else default)
    for model, batch, seqlen in itertools.product(models, batches, args.seqlen or [128]):
        many = args.batches if args.lengths in ("reviews", "plots") else 1
        drawn = _lengths(args, batch, seqlen, "full" if batch == 1 else "uniform", many)
        yield None, works.Model(**common, **_named(model), batches=drawn)


def _train(args, common, gpu):
    from bert_fast.bench import works

    models = args.models or (["minilm-l6"] if args.quick else ["minilm-l6", "bert-base"])
    default = [64] if gpu else [8]
    for model, batch, seqlen in itertools.product(
        models, args.batch or default, args.seqlen or [128]
    ):
        many = args.batches if args.lengths in ("reviews", "plots") else 1
        yield (
            None,
            works.Train(
                **common, **_named(model), batches=_lengths(args, batch, seqlen, batches=many)
            ),
        )


def _sweep(args, common, gpu):
    """One encoder layer; what is not swept stays."""
    from bert_fast.bench import works

    points = SWEEPS[args.over]
    model = _named((args.models or ["minilm-l6"])[0])
    tokens, batch, seqlen = (65536, 256, 128) if gpu else (SWEEP_TOKENS, 16, 128)
    if args.quick:
        points, tokens = [p for p in points if p <= 512][:5], tokens // 4
    seqlen, batch = (args.seqlen or [seqlen])[0], (args.batch or [batch])[0]
    for point in points:
        changes = {}
        if args.over == "seqlen":
            (lengths,) = _lengths(args, max(1, tokens // point), point, "full")
        elif args.over == "batch":
            (lengths,) = _lengths(args, point * (16 if gpu else 1), seqlen)
        elif args.over == "padding":
            (lengths,) = _lengths(args, batch, seqlen, share=1 - point)
        else:
            (lengths,) = _lengths(args, batch, seqlen)
            changes = {"hidden_size": point, "intermediate_size": 4 * point,
                       "num_attention_heads": max(1, point // 64)}  # fmt: skip
        yield point, works.Layer(**common, **model, batches=(lengths,), config_changes=changes)
