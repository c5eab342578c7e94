"""Writes the README's measured tables from benchmarks/results/*/*.json, between its markers.

python -m benchmarks.readme
"""

from pathlib import Path

from benchmarks import busy
from bert_fast.bench import report
from bert_fast.bench.command import lines

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: written by benchmarks.readme -->", "<!-- /measured -->"
LEGEND = (
    "fp32 inference unless said otherwise; medians; each row is one run, contestants in turn. "
    'A column "faster than" says how many times. "GEMMs alone": the row\'s matrix products by '
    "`torch.mm` (MKL) and nothing else: a bound, not a contestant."
)
ACCELERATED = "bert_fast.accelerate"
PEERS = ["HF eager", "HF sdpa", "torch.compile default", "ONNX Runtime", "OpenVINO", "CTranslate2"]
PEERS += ["torch dynamic int8", "torchao int8, compiled", "bert_fast, float32"]
PEERS += ["GEMMs alone", "bert_fast, not prepacked"]
KINDS = {"model": "models, with the host's time", "train": "training steps", "op": "attention",
         "rows": "layer-norm, GELU and linear + GELU", "layer": "layers"}  # fmt: skip
DEFINITION = "eager reference"  # ours, and nobody's contestant
# As make gpu names their files, and what makes one
GPU_LEVELS = {"model": "model", "train": "train", "op": "op --ops attention",
              "rows": "op --ops layer_norm gelu linear_gelu", "layer": "layer"}  # fmt: skip


def tables(results=RESULTS):
    """The Markdown of every device's results; for a GPU, "not measured" where there are none."""
    parts = [LEGEND]
    parts += [_device(path) for path in sorted(results.glob("*/bars*.json"))]
    parts += [_growth(path) for path in sorted(results.glob("*/sweep-batch.json"))]
    parts += [_busy(path) for path in sorted(results.glob("*/busy.json"))]
    parts += [_drop_in(path) for path in sorted(results.glob("*/drop-in.json"))]
    parts += [_finetune(path) for path in sorted(results.glob("*/finetune.json"))]
    found = {level: sorted(results.glob(f"*/{level}.json")) for level in GPU_LEVELS}
    parts += [_level(path) for paths in found.values() for path in paths]
    missing = [f"`bert-fast bench {GPU_LEVELS[name]}`" for name, some in found.items() if not some]
    if 0 < len(missing) < len(found):  # where all are, README's own status table says so
        parts.append(f"Not measured on any GPU yet: {', '.join(missing)}.")
    return "\n\n".join(parts)


def _level(path):
    """A level's rows: our best way beside the best of the others, each by its name, and
    the share of the possible."""
    result, facts = _read(path)
    table = [
        f"{facts['device']}, driver {facts['driver']}, torch {facts['torch']}, "
        f"triton {facts.get('triton')}, {facts['date']}, {_commit(facts)}; {KINDS[path.stem]}:",
        "",
        "| workload | ours, ms | by | % of possible | the best other, ms | by | times faster |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        times = {n: r["ms"] for n, r in row["results"].items() if "ms" in r}
        times = {name: ms for name, ms in times.items() if name not in row["ceilings"]}
        names = [name for name in times if name.startswith("bert_fast")]
        mine, best = (
            min(some, key=times.__getitem__, default=None)
            for some in (names, times.keys() - {*names, DEFINITION})
        )
        cells = [row["work"], "no kernel of ours", "", "", "", "", ""]
        if mine is not None:
            possible = row["results"][mine].get("possible", 2)
            # More than all: what was taken for a bound was none.
            cells[1:3] = f"{times[mine]:.3f}", f"`{mine}`"
            cells[3] = f"{possible:.0%}" if possible <= 1 else ""
        if best is not None:
            cells[4:6] = f"{times[best]:.3f}", f"`{best}`"
        if mine is not None and best is not None:
            cells[6] = f"{times[best] / times[mine]:.2f}"
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def _read(path):
    result = report.load(path)
    return result, result["environment"]


def _drop_in(path):
    """Hugging Face's own programs, before and after."""
    result, facts = _read(path)
    table = [
        f"The same work by Hugging Face's code and ours, in turn: {_machine(facts)}:",
        "",
        "| workload | Hugging Face | bert_fast | times faster |",
        "| --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        theirs, ours = row["hugging_face"], row["ours"]
        table.append(
            f"| {row['work']} | {theirs:,.0f} {row['unit']} | {ours:,.0f} {row['unit']} "
            f"| {ours / theirs:.2f} |"
        )
    return "\n".join(table)


def _busy(path):
    """Beside busy processes, over the quiet time."""
    result, facts = _read(path)
    rows = [(row, busy.ratios(row)) for row in result["rows"]]
    names = list(dict.fromkeys(name for _, ratios in rows for name in ratios))
    table = [
        f"Beside {result['processes']} busy processes, times a contestant's own quiet time: "
        f"{_machine(facts)}:",
        "",
        "| workload | bert_fast, ms, quiet and beside | " + " | ".join(names) + " |",
        "| --- " * (2 + len(names)) + "|",
    ]
    for row, ratios in rows:
        cells = [f"{ratios[name]:.2f}" if name in ratios else "-" for name in names]
        ours = ", ".join(f"{row[state]['bert_fast']:.3g}" for state in ("quiet", "busy"))
        table.append(f"| {row['work']} | {ours} | {' | '.join(cells)} |")
    return "\n".join(table)


def _finetune(path):
    """A mean over seeds, and its standard deviation, each."""
    result, facts = _read(path)
    table = [
        "Fine-tuning MiniLM-L6, the same recipe with Hugging Face's model and with ours: "
        f"{_machine(facts)}:",
        "",
        "| task, seeds | figure on test rows | Hugging Face | bert_fast | training, times faster |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        theirs, ours = (
            f"{row['mean'][who]:.3f} ± {row['deviation'][who]:.3f}"
            for who in ("hugging_face", "ours")
        )
        table.append(
            f"| {row['work']}, {len(row['seeds'])} | {row['figure']} | {theirs} | {ours} "
            f"| {1 / row['time']:.2f} |"
        )
    return "\n".join(table)


def _growth(path):
    """How time grows with real tokens, as a line through every contestant's times."""
    result, facts = _read(path)
    found = [
        f"{name} {1e3 * slope:.2f} ms (from {start:.2f}; no point further than {off:.0%})"
        for name, (start, slope, off) in lines("batch", result["rows"]).items()
        if name in ("bert_fast", "HF sdpa")
    ]
    tokens = [row["tokens"] for row in result["rows"]]
    return (
        f"Time grows linearly with real tokens: {result['rows'][0]['work'].partition(',')[0]}, "
        f"128 long, {min(tokens):,} to {max(tokens):,} real tokens on the {facts['device']}: "
        f"for each 1,000, {'; '.join(found)}."
    )


def _commit(facts):
    commit = f"commit {facts.get('commit')}".replace("-dirty", " and uncommitted changes")
    return commit + " and uncommitted changes" if facts.get("dirty") else commit


def _machine(facts):
    return (
        f"{facts['device']}, {facts['threads']} threads, {facts['cpu kernels']}, "
        f"torch {facts['torch']}, transformers {facts['transformers']}, {facts['date']}, "
        f"{_commit(facts)}"
    )


def _device(path):
    """Whole models, a table each dtype, a row each for bert_fast's own and for the accelerated one;
    then the rest."""
    result, facts = _read(path)
    models, others = {}, []
    for row in result["rows"]:
        work, _, dtype = row["work"].rpartition(", ")
        times = {name: r["ms"] for name, r in row["results"].items() if "ms" in r}
        if row["kind"] == "model":
            models.setdefault(dtype, []).append((work, times))
            continue
        (peer,) = row["bars"]
        ours = times["bert_fast"]
        others.append(f"| {work} | {ours:.2f} | `{peer}` | {times[peer] / ours:.2f} |")
    table = [f"{_machine(facts)}:", ""]
    for dtype, rows in models.items():
        peers = [name for name in PEERS if any(name in times for _, times in rows)]
        what = "workload" if dtype == "float32" else f"workload, in {dtype}"
        table += [
            f"| {what} | bert_fast, ms | faster than " + " | faster than ".join(peers) + " |",
            "| --- " * (2 + len(peers)) + "|",
        ]
        for work, times in rows:
            for name, label in (("bert_fast", ""), (ACCELERATED, ", `bert_fast.accelerate`")):
                if (ours := times.get(name)) is not None:
                    ratios = [f"{times[p] / ours:.2f}" if p in times else "-" for p in peers]
                    shown = f"{ours:.0f}" if ours >= 100 else f"{ours:.3g}"
                    table.append(f"| {work}{label} | {shown} | " + " | ".join(ratios) + " |")
        table.append("")
    if others:
        table += ["| workload | bert_fast, ms | peer | times faster than it |"]
        table += ["| --- | --- | --- | --- |", *others]
    return "\n".join(table).rstrip("\n")


def rewritten(readme):
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
