"""make gpu: what only a GPU can show, in one command, offline, within a time limit.

Builds the extension for this GPU (or uses one that was carried here), then runs the parts: first
what checks, side by side, then what measures, one after another. Each is a process of its own that
is stopped when time is up. Whatever a part has written by then stays: every file in the output
folder is complete or ends at a whole line.

    make gpu OUT=DIR [PARTS="test memcheck model op rows layer train sweep ..."] [LIMIT=540]
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
CHECKS = ("test", *SANITIZER_TOOLS)  # they run side by side; what measures has the machine alone
CHECKS_LIMIT = 0.45  # of the time
PATIENCE = 5  # seconds, with what was asked to end
GPU_TESTS = ("tests/ops", "tests/models", "tests/backends", "tests/bench", "tests/embeddings",
             "tests/hugging_face", "tests/training")  # fmt: skip


def parts(out):
    """Name -> command: checks, then measurements in the order of their worth. Each command's output
    goes to NAME.log."""
    python = sys.executable
    bench = [python, "-m", "bert_fast.cli", "bench"]
    compiled = ["torch.compile default", "torch.compile reduce-overhead"]
    options = {
        "model": ["model", "--seconds", "2", "--peers", "HF sdpa", *compiled],
        "op": ["op", "--ops", "attention", "--models", "bert-base", "--seqlen", "128", "512",
               "2048", "--seconds", "1", "--peers", "SDPA", "flash"],
        "rows": ["op", "--ops", "layer_norm", "gelu", "linear_gelu", "--seconds", "1",
                 "--peers", "torch.nn.functional", "torch.compile default"],
        "train": ["train", "--seconds", "3", "--peers", "HF sdpa", "torch.compile default"],
        "layer": ["layer", "--seconds", "1", "--peers", "HF sdpa", "TransformerEncoderLayer"],
        "sweep": ["sweep", "seqlen", "--seconds", "1"],
    }  # fmt: skip
    measured = {
        name: [*bench, *some, "--device", "cuda", "--json", str(out / f"{name}.json"),
               "--plot", str(out / f"{name}.png")]
        for name, some in options.items()
    }  # fmt: skip
    tests = [python, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    # Most of a test's time is Triton's compiler, on one core.
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    some = "cuda-gpu and forward_and_backward and bfloat16"
    # What racecheck looks at takes the longest: attention alone, which it has seen to the end.
    chosen = {"racecheck": [f"{some} and causal-dropout", "tests/ops/test_attention.py"]}
    sanitized = {
        tool: ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *tests,
               "-k", *chosen.get(tool, [some, "tests/ops"])]
        for tool in SANITIZER_TOOLS
    }  # fmt: skip
    return {"test": [*tests, *workers, "--tb=short", *GPU_TESTS], **sanitized, **measured}


def run_parts(chosen, commands, out, limit):
    """Runs the chosen parts; returns name -> "ok", "failed", "out of time" or "not started", which
    summary.json also says, after every part."""
    begin, status = time.monotonic(), dict.fromkeys(chosen, "not started")
    measurements, writing = [name for name in chosen if name not in CHECKS], threading.Lock()

    def run(name):
        share = CHECKS_LIMIT if name in CHECKS and measurements else 1.0
        left = begin + share * limit - time.monotonic()
        if left > 0:
            status[name] = _run(commands[name], out / f"{name}.log", left)
            with writing:
                summary = json.dumps(status, indent=1) + "\n"
                (out / "summary.json").write_text(summary, encoding="utf-8")
        print(f"{name}: {status[name]}, {time.monotonic() - begin:.0f} s", flush=True)

    with ThreadPoolExecutor(len(CHECKS)) as pool:
        list(pool.map(run, [name for name in chosen if name in CHECKS]))
    for name in measurements:
        run(name)
    return status


def _run(command, log, seconds):
    with open(log, "w", encoding="utf-8") as file:
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
            os.killpg(process.pid, signal.SIGINT)  # pytest then says what it has found
            try:
                process.wait(timeout=PATIENCE)
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
