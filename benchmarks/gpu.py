"""make gpu: what only a GPU can show, in one command, offline, within a time limit.

Builds the extension for this GPU (or uses one that was carried here), then runs the parts in order,
each in a process of its own that is stopped when time is up. Whatever a part has written by then
stays: every file in the output folder is complete or ends at a whole line.

    make gpu OUT=DIR [PARTS="test op model layer train sweep sanitize"] [LIMIT=540]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def parts(out):
    """Name -> commands, in the order of their worth. Each command's output goes to NAME.log."""
    python = sys.executable
    bench = [python, "-m", "bert_fast.cli", "bench"]
    options = {
        "op": ["--seconds", "2"],
        "model": ["--seconds", "3", "--peers", "HF", "torch.compile default"],
        "layer": ["--seconds", "2"],
        "train": ["--seconds", "4", "--peers", "HF", "torch.compile default"],
        "sweep": ["seqlen", "--seconds", "1"],
    }
    tests = [python, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    measured = {
        level: [[*bench, level, *some, "--device", "cuda", "--json", str(out / f"{level}.json"),
                 "--plot", str(out / f"{level}.png")]]
        for level, some in options.items()
    }  # fmt: skip
    checked = ["-k", "cuda-gpu and forward_and_backward", "tests"]
    sanitized = [
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *tests, *checked]
        for tool in SANITIZER_TOOLS
    ]
    return {"test": [[*tests, "-v"]], **measured, "sanitize": sanitized}


def run_parts(chosen, commands, out, limit):
    """Runs the chosen parts; returns name -> "ok", "failed", "out of time" or "not started", which
    summary.json also says, after every part."""
    end, status = time.monotonic() + limit, dict.fromkeys(chosen, "not started")
    for name in chosen:
        for command in commands[name]:
            if time.monotonic() >= end:
                break
            status[name] = _run(command, out / f"{name}.log", end - time.monotonic())
            if status[name] != "ok":
                break
        (out / "summary.json").write_text(json.dumps(status, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {status[name]}", flush=True)
    return status


def _run(command, log, seconds):
    with open(log, "a", encoding="utf-8") as file:
        print(f"$ {' '.join(command)}", file=file, flush=True)
        try:
            # A session of its own, so that at the limit its children end with it.
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        except OSError as error:
            print(error, file=file)
            return "failed"
        try:
            return "ok" if process.wait(timeout=seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "out of time"


def build(log):
    """A ready-made extension with CUDA kernels, or one built for this GPU alone; and kernels/ where
    an installation has it."""
    link = ROOT / "bert_fast" / "kernels"
    if not link.exists():
        link.symlink_to("../kernels")
    ready = "from bert_fast import _C; assert _C.cuda_archs"
    if subprocess.run([sys.executable, "-c", ready], cwd=ROOT, capture_output=True).returncode == 0:
        return "carried"
    with open(log, "w", encoding="utf-8") as file:
        answer = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT,
            env={**os.environ, "BERT_FAST_CUDA": "on"}, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    if answer.returncode:
        sys.exit(f"the extension did not build: see {log}")
    return "built here"


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", required=True)
    options.add_argument("--parts", default="")
    options.add_argument("--limit", type=float, default=540, help="seconds (default 540)")
    args = options.parse_args()
    begin, out = time.monotonic(), Path(args.out)
    try:
        import torch

        found = torch.cuda.is_available()
    except ImportError:
        found = False
    if not found:
        print("make gpu: no NVIDIA GPU that PyTorch can use here; nothing was run", file=sys.stderr)
        return 2
    commands = parts(out)
    chosen = args.parts.split() or list(commands)
    if unknown := set(chosen) - set(commands):
        options.error(f"--parts: {', '.join(unknown)}: choose from {', '.join(commands)}")
    out.mkdir(parents=True, exist_ok=True)
    extension = build(out / "build.log")
    from bert_fast.bench import report  # the package, once it is built

    facts = report.environment("cuda") | {"extension": extension}
    report.write(out / "environment.json", facts)
    print(report.title(facts), flush=True)
    status = run_parts(chosen, commands, out, args.limit - (time.monotonic() - begin))
    return 0 if set(status.values()) == {"ok"} else 1


if __name__ == "__main__":
    sys.exit(main())
