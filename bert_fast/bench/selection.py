"""What is measured, and beside whom: by the options, and where none is given."""

import itertools
from pathlib import Path

import bert_fast
from bert_fast.backends import BACKENDS
from bert_fast.bench import lengths, works
from bert_fast.bench.peers import InFloat32, Ours, peers

SWEEP_PEERS = ("HF eager", "HF sdpa", "torch.nn.TransformerEncoderLayer")
IN_FLOAT32 = ("bert_fast", "HF sdpa", "ONNX Runtime", "OpenVINO", "CTranslate2")
SWEEPS = {
    "seqlen": (32, 64, 128, 256, 512, 1024, 2048, 4096),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "padding": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "width": (128, 256, 512, 768, 1024, 1536, 2048),
}
MODEL_SIZES = [*itertools.product((1, 8), (16, 32, 128)), (32, 128)]  # (batch, seqlen) on a CPU
SWEEP_TOKENS = 4096  # a batch, where length is swept


def chosen_peers(args):
    """Ours, the peers asked for, and the ceilings."""
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


def with_float32(who, work):
    """Of a model in a cheaper dtype on the CPU: the contestants, and those of ``IN_FLOAT32`` among
    them in float32 too, for the ratio."""
    if work.kind != "model" or work.dtype not in works.LOW or work.device != "cpu":
        return who
    return who + [InFloat32(peer) for peer in who if peer.name in IN_FLOAT32]


def works_of(args):
    """(x, work) in order; x is the swept value, or None."""
    gpu = args.device == "cuda"
    if "int8" in (args.dtype or ()) and (args.level != "model" or gpu):
        raise ValueError("--dtype int8 is of whole models on the CPU: bert-fast bench model")
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
    share = args.share if share is None else share
    drawn = lengths.draw(args.lengths or distribution, batch, seqlen, share, args.order, batches)
    return tuple(tuple(some) for some in drawn)


def _config(model):

    if model in works.MODELS:
        return bert_fast.BertConfig(**works.MODELS[model])
    return bert_fast.BertConfig.from_json(Path(model) / "config.json")


def _named(model):
    """A model's name, or a checkpoint's directory and the name of that."""
    if model in works.MODELS:
        return {"name": model}
    return {"name": Path(model).name, "directory": model}


def _ops(args, common, gpu):
    """Attention at BERT's lengths; the row-wise ops at the models' widths. Forward first: it is
    what inference is made of."""
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
    batches = args.batch or ([128] if gpu else [8])
    for direction, model in itertools.product(args.directions, args.models or ["bert-base"]):
        for batch, seqlen in itertools.product(batches, args.seqlen or [128]):
            yield None, works.Layer(
                **common, backward=direction == "backward", **_named(model),
                batches=_lengths(args, batch, seqlen),
            )  # fmt: skip


def _models(args, common, gpu):
    """Batch 1 first (latency), then throughput."""
    models = args.models or (["minilm-l6"] if args.quick else list(works.MODELS))
    sizes = itertools.product(
        args.batch or ([16] if args.quick else [1, 256] if gpu else [1, 8, 32]),
        args.seqlen or [128],
    )
    if not (gpu or args.quick or args.batch or args.seqlen):
        sizes = MODEL_SIZES
    for model, (batch, seqlen) in itertools.product(models, sizes):
        many = args.batches if args.lengths in ("reviews", "plots") else 1
        drawn = _lengths(args, batch, seqlen, "full" if batch == 1 else "uniform", many)
        yield None, works.Model(**common, **_named(model), batches=drawn)


def _train(args, common, gpu):
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
