"""Writes the README's measured tables from benchmarks/results/*/bars.json, between its markers.

python -m benchmarks.readme
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: written by benchmarks.readme -->", "<!-- /measured -->"
PEERS = ["HF sdpa", "torch.compile default", "ONNX Runtime", "OpenVINO", "CTranslate2"]
PEERS += ["GEMMs alone", "bert_fast, not prepacked"]


def tables():
    """The Markdown of every device's results."""
    return "\n\n".join(_device(path) for path in sorted(RESULTS.glob("*/bars.json")))


def _device(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    facts = result["environment"]
    lines = [
        f"{facts['device']}, {facts['threads']} threads, {facts['cpu kernels']}, fp32, "
        f"torch {facts['torch']}, transformers {facts['transformers']}, {facts['date']}. Each row "
        "is one run, contestants in turn, medians; a peer's figure is its time over ours. "
        '"GEMMs alone": the row\'s matrix products by `torch.mm` (MKL) and nothing else.',
        "",
        "| work | ours, ms | " + " | ".join(PEERS) + " |",
        "| --- " * (2 + len(PEERS)) + "|",
    ]
    others = []
    for row in result["rows"]:
        times = {name: r["ms"] for name, r in row["results"].items()}
        ours, work = times["bert_fast"], row["work"].partition(";")[0]
        if "GEMMs alone" in times:
            ratios = [f"{times[p] / ours:.2f}x" if p in times else "-" for p in PEERS]
            lines.append(f"| {work} | {ours:.0f} | " + " | ".join(ratios) + " |")
        else:
            (peer,) = (name for name in times if name != "bert_fast")
            others.append(f"| {work} | {ours:.2f} | `{peer}` | {times[peer] / ours:.2f}x |")
    lines += ["", "| work | ours, ms | peer | |", "| --- | --- | --- | --- |", *others]
    return "\n".join(lines)


def rewritten(readme):
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
