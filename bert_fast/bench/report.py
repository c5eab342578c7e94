"""Rows as a table and as JSON, with the machine that made them."""

import contextlib
import csv
import json
import platform
import subprocess
from datetime import date
from importlib import metadata
from pathlib import Path

import torch
from rich.table import Table

import bert_fast
from bert_fast.bench import quality
from bert_fast.files import atomic_path

OURS = "bert_fast"
PACKAGES = ("triton", "transformers", "sentence-transformers", "onnxruntime", "openvino", "nncf",
            "ctranslate2", "torchao", "zentorch")  # fmt: skip
SCHEMA = 1  # of result files; rises when a reader of the old ones would misread the new


def environment(device="cpu"):
    """The machine and everything whose version could change a result."""
    facts = {"device": _processor(), "threads": torch.get_num_threads()}
    with contextlib.suppress(ImportError):
        from bert_fast import _C

        facts["cpu kernels"] = _C.cpu_isa() + (" + AMX" if _C.linear_kind(0) == "amx" else "")
    if device == "cuda":
        facts |= {
            "device": torch.cuda.get_device_name(),
            "compute capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    facts |= {"bert_fast": bert_fast.__version__, "torch": torch.__version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[package] = metadata.version(package)
    root = Path(bert_fast.__file__).resolve().parent.parent
    if (root / ".git").exists():
        facts["commit"] = _said("git", "-C", str(root), "rev-parse", "--short", "HEAD")
        # None where git does not answer: then nobody knows.
        status = _said("git", "-C", str(root), "status", "--porcelain")
        facts["dirty"] = None if status is None else status != ""
    return facts | {"python": platform.python_version(), "date": date.today().isoformat()}


def _processor():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _said(*command):
    """What a command prints; None where it cannot be run or fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def title(facts):
    return ", ".join(f"{name}: {value}" for name, value in facts.items())


def table(row):
    """A row's contestants, ours first; refused and absent ones with their reasons."""
    shown = Table(title=row["work"], title_justify="left")
    columns = ["", "ms", "spread", "time / ours", "rate", "% of possible", "error"]
    low = any("cosine" in result for result in row["results"].values())
    for column in columns + ["cosine"] * low:
        shown.add_column(column, justify="left" if not column else "right")
    ours = row["results"].get(OURS, {}).get("ms")
    for name, result in row["results"].items():
        if "refused" in result:
            shown.add_row(name, "[red]refused[/red]", end_section=True)
            shown.add_row(f"  {result['refused']}")
            continue
        low, high = result["spread"]
        ms = result["ms"]
        shown.add_row(
            name, f"{ms:.3f}", f"{low:.3f} - {high:.3f}", f"{ms / ours:.2f}" if ours else "",
            _rate(row, name, ms), f"{100 * result['possible']:.0f}" if "possible" in result else "",
            f"{result['error']:.2f}" if "error" in result else "",
            *([quality.shown(result["cosine"]) if "cosine" in result else ""] if low else []),
        )  # fmt: skip
    if row["kind"] == "train":
        peaks = {
            name: result["peak_bytes"] for name, result in row["results"].items()
            if result.get("peak_bytes") and name not in row["ceilings"]
        }  # fmt: skip
        shown.caption = "peak memory beyond what was there before: " + ", ".join(
            f"{name} {size / 2**20:,.0f} MiB" for name, size in peaks.items()
        )
    return shown


def _rate(row, name, ms):
    if name.startswith("copy"):
        return f"{row['bytes'] / ms / 1e6:,.0f} GB/s"
    if row["tokens"] and row["kind"] in ("layer", "model", "train"):
        return f"{row['tokens'] / ms * 1e3:,.0f} tokens/s"
    if row["flops"]:
        return f"{row['flops'] / ms / 1e6:,.0f} GFLOP/s"
    return f"{row['bytes'] / ms / 1e6:,.0f} GB/s"


def absences(rows):
    """name -> reason, of those that no row has; differing reasons keep their work's kind."""
    present = {name for row in rows for name in row["results"]}
    reasons = {}
    for row in rows:
        for name, reason in row["absent"].items():
            label = f"{name} ({row['work']})" if name in present else name
            reasons.setdefault(label, reason)
    return reasons


def noise_line(noise):
    line = (
        f"Spreads: {noise['spread']:.0%} of a time in the middle, {noise['largest_spread']:.0%} at "
        f"most; the machine's own ceilings moved by {noise['drift']:.0%} during the run."
    )
    if noise["too_noisy"]:
        line += (
            " [bold]This machine is too noisy[/bold] for smaller differences: stop other programs, "
            "or measure longer (--seconds)."
        )
    return line


def write(path, result):
    """JSON, whole or not at all."""
    with atomic_path(path) as scratch:
        whole = json.dumps({"schema": SCHEMA, **result}, indent=1)
        Path(scratch).write_text(whole + "\n", encoding="utf-8")


COLUMNS = ("work", "kind", "contestant", "ms", "spread_low", "spread_high", "possible", "error",
           "cosine_mean", "cosine_p1", "cosine_least", "host_us",
           "peak_bytes", "tokens", "flops", "bytes", "refused")  # fmt: skip


def write_csv(path, rows):
    """A line for each work and contestant; what was not measured is empty."""
    with atomic_path(path) as scratch, open(scratch, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            for name, result in row["results"].items():
                low, high = result.get("spread", (None, None))
                cosines = {f"cosine_{key}": v for key, v in result.get("cosine", {}).items()}
                line = {**row, **result, **cosines, "contestant": name}
                writer.writerow(line | {"spread_low": low, "spread_high": high})


def load(path):
    """A result file's content.

    Raises:
        ValueError: it is no JSON object, or of a schema that this version does not read.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        schema = result.get("schema", 1)  # files from before there was one are of the first
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is not a result of bert-fast bench: {error!r}") from error
    if schema != SCHEMA:
        raise ValueError(f"{path} is of schema {schema}; this version reads {SCHEMA}")
    return result


def read(path):
    result = load(path)
    try:
        rows = {row["work"]: row["results"] for row in result["rows"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of bert-fast bench: {error!r}") from error
    return result, rows
