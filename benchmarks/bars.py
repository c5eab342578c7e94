"""make bench: the speed bars, each a least ratio of a peer's time to ours in one run.

How it is measured is bert_fast/bench; here is what, and what it must reach.
"""

import argparse

import torch
from rich.console import Console

from bert_fast.bench import data, lengths, report
from bert_fast.bench.peers import Compiled, InFloat32, Ours, peers
from bert_fast.bench.run import BLOCKS, ceilings, measure, noise
from bert_fast.bench.works import LOW, Attention, Gelu, LayerNorm, Model, Train

LEFT_OUT = "max-autotune", "reduce-overhead", "eager reference", "TransformerEncoderLayer"
GEMMS = {"GEMMs alone": 1 / 1.05}


def rows():
    """(work, {peer: least ratio of its time to ours})"""

    def uniform(batch, seqlen, share):
        return tuple(map(tuple, lengths.draw("uniform", batch, seqlen, share)))

    float32 = {"dtype": torch.float32}
    minilm, base = {"name": "MiniLM-L6", "directory": str(data.minilm())}, {"name": "bert-base"}
    single, two = ((16,),), ((32,),)
    long, some, many = ((128,),), uniform(8, 32, 0.65), uniform(32, 128, 0.65)
    most = uniform(8, 128, 0.65)
    compiled = "ONNX Runtime", "OpenVINO"
    for batches, bar in ((single, 1.2), (two, 1.2), (long, 1.1), (some, 1.1)):
        yield Model(**float32, **minilm, batches=batches), dict.fromkeys(compiled, bar)
    yield Model(**float32, **minilm, batches=many), {
        "OpenVINO": 1.35, "HF sdpa": 2.0, "CTranslate2": 1.12, **GEMMS,
    }  # fmt: skip
    yield Model(**float32, **base, batches=two), dict.fromkeys(compiled, 1.1)
    full = ((128,) * 8,)
    yield Model(**float32, **base, batches=full), {"HF sdpa": 1.35, "ONNX Runtime": 1.0, **GEMMS}
    yield Model(**float32, **base, batches=most), {"HF sdpa": 1.9, **GEMMS}
    for dtype, faster, ahead_of in (
        (torch.bfloat16, 1.8, ("HF sdpa", "OpenVINO")),
        (torch.int8, 1.8 * 1.5, ("ONNX Runtime", "OpenVINO", "CTranslate2")),
    ):
        works = [(minilm, batches) for batches in (single, two, long, some, many)]
        for model, batches in [*works, (base, two), (base, most)]:
            bars = dict.fromkeys(ahead_of, 1.0)
            # int8 is asked for 1.5 times bf16's speed at many rows alone.
            if dtype == torch.bfloat16 or batches in (many, most):
                bars["bert_fast, float32"] = faster
            yield Model(dtype=dtype, **model, batches=batches), bars
    yield LayerNorm(**float32), {"torch.nn.functional": 1.5}
    yield LayerNorm(**float32, backward=True), {"torch.nn.functional": 1.0}
    yield Gelu(**float32), {"torch.nn.functional": 1.0}
    mixed = (13, 128, 57, 99, 128, 31, 77, 120)
    yield Attention(**float32, lengths=mixed), {"SDPA, one call per sequence": 1.2}
    yield Train(**float32, **base, batches=most), {"HF sdpa": 1.3}


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=20, help="of timing a row (default 20)")
    options.add_argument("--json", help="also write everything here")
    options.add_argument("--blocks", type=int, default=BLOCKS, help="see bench/run.py (default 4)")
    options.add_argument(
        "--rows", nargs="+", default=[""], help="those that have this in their name"
    )
    args = options.parse_args()
    # These take minutes for each model, or are nobody's contestants; `bert-fast bench` has them.
    who = [peer for peer in peers("cpu") if not peer.name.endswith(LEFT_OUT)]
    console, before = Console(width=120), ceilings("cpu", torch.float32)
    result = {"environment": report.environment(), "ceilings": before, "rows": []}
    console.print(report.title(result["environment"]))
    for work, bars in rows():
        if not any(some in str(work) for some in args.rows):
            continue
        # In training it takes minutes to compile each model.
        some = [peer for peer in who if work.kind != "train" or not isinstance(peer, Compiled)]
        if work.kind == "model" and work.dtype in LOW:
            some = [*some, InFloat32(Ours())]
        row = measure(work, some, args.seconds, blocks=args.blocks) | {"bars": bars}
        result["rows"].append(row)
        if args.json:  # as soon as it exists
            report.write(args.json, result)
        console.print(report.table(row))
        for name, bar in bars.items():
            theirs, ours = (row["results"].get(who, {}) for who in (name, report.OURS))
            if "ms" not in theirs or "ms" not in ours:
                reason = theirs.get("refused") or ours.get("refused") or row["absent"].get(name)
                console.print(f"bar not measured: {name}: {reason}")
                continue
            ratio = theirs["ms"] / ours["ms"]
            verdict = "met" if ratio >= bar else "[bold]missed[/bold]"
            console.print(
                f"bar: {name} takes at least {bar:.2f}x our time: {ratio:.2f}x, {verdict}"
            )
    for name, reason in report.absences(result["rows"]).items():
        console.print(f"not here: {name}: {reason}", highlight=False)
    result["noise"] = noise(result["rows"], before, ceilings("cpu", torch.float32))
    console.print(report.noise_line(result["noise"]))
    if args.json:
        report.write(args.json, result)


if __name__ == "__main__":
    main()
