"""The ``bert-fast`` command."""

import argparse
import json
import sys
import warnings
from pathlib import Path

import bert_fast


def env(args):
    """What this machine has, and which kernels ``auto`` picks on it."""
    import platform

    import torch
    from rich.console import Console
    from rich.table import Table

    from bert_fast import backends

    console = Console()
    console.print(f"bert_fast {bert_fast.__version__}, torch {torch.__version__}, "
                  f"Python {platform.python_version()}, {platform.machine()}")  # fmt: skip
    console.print(f"CPU threads: {torch.get_num_threads()}")
    try:
        from bert_fast import _C

        console.print(f"CPU kernels: {_C.cpu_isa()}; CUDA kernels for: {_C.cuda_archs or 'none'}")
    except ImportError as error:
        console.print(f"compiled extension: absent ({error})")
    if torch.cuda.is_available():
        console.print(f"GPU: {torch.cuda.get_device_name()}")

    table = Table("backend", "here", *backends.OPS, title="backends")
    for name in backends.BACKENDS:
        reason = backends.why_unavailable(name)
        ops = [_describe(name, op) for op in backends.OPS]
        table.add_row(name, reason or "yes", *ops)
    console.print(table)
    table = Table("tensors on", "auto tries, in order", title="auto")
    for device, order in backends.AUTO.items():
        table.add_row(device, ", ".join(order))
    console.print(table)
    console.print(
        "Override: backend=..., bert_fast.use_backend(...), or the variable BERT_FAST_BACKEND."
    )


def _describe(name, op):
    from bert_fast import backends

    if name == "eager":
        return "all dtypes"
    support = backends.SUPPORT[name].get(op)
    if support is None:
        return "-"
    return "forward, backward" if support.backward else "forward"


def embed(args):
    """Embed texts: one vector for each."""
    import numpy as np

    from bert_fast.backends import resolve_device
    from bert_fast.embeddings.encoder import SentenceEncoder
    from bert_fast.files import atomic_path
    from bert_fast.text import read_texts

    out = Path(args.out)
    if out.suffix not in (".npy", ".jsonl"):
        raise ValueError(f"--out must end in .npy or .jsonl, not {out.name}")
    if not out.parent.is_dir():
        raise ValueError(f"--out: there is no directory {out.parent}")
    if out.exists() and not args.overwrite:
        raise ValueError(f"{out} exists; --overwrite replaces it")
    texts = read_texts(args.text, keep_blank=True)
    encoder = SentenceEncoder(args.model, args.dtype, resolve_device(args.device))
    embeddings = encoder.encode(texts, batch_tokens=args.batch_tokens)
    with atomic_path(out) as path:
        if out.suffix == ".npy":
            np.save(path, embeddings)
        else:
            with open(path, "w", encoding="utf-8") as file:
                for text, vector in zip(texts, embeddings, strict=True):
                    row = {"text": text, "embedding": [float(x) for x in vector]}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(texts)} texts, {embeddings.shape[1]} dimensions: {out}")


def rerank(args):
    """Rank texts for a query, with a cross-encoder."""
    from bert_fast.backends import resolve_device
    from bert_fast.embeddings.cross_encoder import CrossEncoder
    from bert_fast.files import atomic_path
    from bert_fast.text import read_texts

    out = Path(args.out) if args.out else None
    if out is not None and out.exists() and not args.overwrite:
        raise ValueError(f"{out} exists; --overwrite replaces it")
    texts = read_texts(args.text, keep_blank=True)
    model = CrossEncoder(args.model, args.dtype, resolve_device(args.device))
    ranked = model.rank(
        args.query, texts, top_k=args.top_k, return_documents=True, batch_tokens=args.batch_tokens
    )
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ranked]
    if out is None:
        sys.stdout.writelines(lines)
        return
    with atomic_path(out) as path:
        Path(path).write_text("".join(lines), encoding="utf-8")
    print(f"{len(texts)} texts, {len(ranked)} written: {out}")


def compare(args):
    """Compare Hugging Face and bert_fast on the same checkpoint and texts."""
    from bert_fast.backends import resolve_device
    from bert_fast.bench.compare import compare, report
    from bert_fast.text import read_texts

    texts = read_texts(args.text, keep_blank=True)[: args.limit]
    rows, tokens = compare(
        args.model, texts, rounds=args.rounds, device=resolve_device(args.device), dtype=args.dtype
    )
    report(rows, tokens, args.plot)


def inspect(args):
    """What the compilers made of the Triton and CUDA kernels: registers, spills, instructions by
    pipe, and the speed that a chip allows them at most. Needs no GPU; measures nothing."""
    from rich.console import Console

    from bert_fast import inspect
    from bert_fast.files import atomic_path

    if unknown := set(args.chips) - set(inspect.CHIPS):
        known = ", ".join(map(str, inspect.CHIPS))
        raise ValueError(f"--chips: {', '.join(map(str, unknown))}: choose from {known}")
    console = Console(width=None if Console().is_terminal else 240)
    if args.lengths:
        if min(args.lengths) < 1:
            raise ValueError(f"--lengths: a sequence has 1 token or more, not {min(args.lengths)}")
        for chip in args.chips:
            console.print(inspect.layer_table(chip, args.lengths))
        return 0
    others, missing = [], {}
    if args.peers or args.tutorial is not None:  # first: it may be refused
        others, missing = inspect.others(args.chips, args.tutorial)
    compiled = list(inspect.inspect(args.chips, args.names, args.full))
    compiled += inspect.cuda_kernels(args.chips, args.names)
    faults = [(c, fault) for c in compiled for fault in c.faults()]
    compiled += others
    for name, reason in missing.items():
        console.print(f"{name}: not counted, {reason}", markup=False, highlight=False)
    console.print(inspect.table(compiled))
    console.print(inspect.costs(compiled))
    for c, fault in faults:
        console.print(f"[red]{c.work}: {c.kernel} on {c.chip}: {fault}[/red]")
    if args.json:
        rows = [inspect.row(c) for c in compiled]
        with atomic_path(args.json) as path:
            Path(path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 1 if faults else 0


def _env_options(commands):
    _command(commands, env)


def _embed_options(commands):
    sub = _command(commands, embed)
    _model_and_text(sub)
    sub.add_argument(
        "--out", required=True, help=".npy, or .jsonl with each text beside its vector"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    _dtype(sub)
    sub.add_argument(
        "--batch-tokens", type=int, default=4096, help="tokens per batch (default 4096)"
    )


def _dtype(sub):
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "int8"),
                     help="of the encoder's products; int8 on a CPU alone (default: the "
                          "checkpoint's)")  # fmt: skip


def _rerank_options(commands):
    sub = _command(commands, rerank)
    _model_and_text(sub)
    sub.add_argument("--query", required=True, help="what the texts are ranked for")
    _dtype(sub)
    sub.add_argument("--top-k", type=int, help="how many of the best to give (default all)")
    sub.add_argument(
        "--out", help="the .jsonl file to write to (default: standard output)"
    )  # fmt: skip
    sub.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    sub.add_argument("--batch-tokens", type=int, default=4096, help="tokens per batch")


def _compare_options(commands):
    sub = _command(commands, compare)
    _model_and_text(sub)
    sub.add_argument("--limit", type=int, metavar="N", help="the first N texts only")
    sub.add_argument("--rounds", type=int, default=3, help="timed rounds, interleaved (default 3)")
    sub.add_argument(
        "--dtype", choices=("float32", "bfloat16", "int8"), default="float32",
        help="ours in it, beside float32: how fast, and how near (default float32)",
    )  # fmt: skip
    sub.add_argument("--plot", help="draw the times to this PNG file")


def _inspect_options(commands):
    sub = _command(commands, inspect)
    sub.add_argument("--chips", type=int, nargs="+", default=[90],
                     help="compute capabilities, such as 80 or 90 (default 90)")  # fmt: skip
    sub.add_argument("--names", default="", help="only kernels whose name contains this")
    sub.add_argument("--full", action="store_true", help="every dtype, head_dim and flag")
    sub.add_argument("--peers", action="store_true",
                     help="also others' kernels: what torch's Inductor writes, and, where they are "
                          "installed, FlashAttention-2 and -3 and Liger")  # fmt: skip
    sub.add_argument("--tutorial", metavar="FILE",
                     help="the same, and the attention of Triton's tutorial: "
                          "python/tutorials/06-fused-attention.py of a checkout of Triton, which "
                          "is loaded")  # fmt: skip
    sub.add_argument("--lengths", type=int, nargs="+", metavar="N",
                     help="instead: a layer of BERT-base at best, for a batch of sequences of "
                          "these lengths")  # fmt: skip
    sub.add_argument("--json", help="also write the table to this file")


def _pretrain_options(commands):
    from bert_fast.training import pretrain

    pretrain.add_parser(commands)


def _finetune_options(commands):
    from bert_fast.training import finetune

    finetune.add_parsers(commands)  # predict's, too


def _bench_options(commands):
    from bert_fast.bench import command

    command.add_parser(commands)


# Each command's line in --help, and what adds its parser. The help stands here because a command's
# own module may take seconds to import: it is imported for that command alone.
COMMANDS = {
    "env": (env.__doc__, _env_options),
    "embed": (embed.__doc__, _embed_options),
    "rerank": (rerank.__doc__, _rerank_options),
    "compare": (compare.__doc__, _compare_options),
    "pretrain": ("Pre-train a BERT on plain text.", _pretrain_options),
    "finetune": ("Fine-tune a BERT for a task and evaluate it on test rows.", _finetune_options),
    "predict": ("Predictions of a fine-tuned model, one JSON object per row.", _finetune_options),
    "bench": ("Time kernels and models beside their peers.", _bench_options),
    "inspect": (inspect.__doc__, _inspect_options),
}


def _command(commands, function):
    text = function.__doc__
    sub = commands.add_parser(function.__name__, help=text, description=text)
    sub.set_defaults(function=function)
    return sub


def _model_and_text(sub):
    sub.add_argument(
        "--model", required=True,
        help="directory of a Hugging Face checkpoint, or its name on the Hugging Face Hub",
    )  # fmt: skip
    sub.add_argument(
        "--text", required=True,
        help='one text per line; or a .jsonl, .csv or .tsv file with a "text" in each row',
    )  # fmt: skip
    sub.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="where the model runs (default auto: the GPU where there is one)",
    )  # fmt: skip


def parser(argv=None):
    """The parser for ``argv``: options for the command it names, only names for the others;
    without ``argv``, every command in full."""
    root = argparse.ArgumentParser(prog="bert-fast", description=bert_fast.__doc__)
    root.add_argument("--version", action="version", version=bert_fast.__version__,
                      help="print the version and exit")  # fmt: skip
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    if argv is None:
        for options in dict.fromkeys(options for _, options in COMMANDS.values()):
            options(commands)
        return root
    chosen = next((word for word in argv if not word.startswith("-")), None)
    _, chosen_options = COMMANDS.get(chosen, (None, None))
    for name, (text, options) in COMMANDS.items():
        if options is not chosen_options:
            commands.add_parser(name, help=text)
        elif name == chosen:
            options(commands)
    return root


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parser(argv).parse_args(argv)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        return args.function(args) or 0
    except (ValueError, OSError, ImportError, bert_fast.BackendUnavailableError) as error:
        print(f"bert-fast {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
