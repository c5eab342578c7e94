"""The ops on a GPU against PyTorch's, as a share of the copy bandwidth measured in the same run.

Nothing is timed before its result is right. Times are medians of CUDA events; contestants take
turns; inputs rotate through more memory than the L2 holds.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

import bert_fast
from benchmarks.gpu import environment

SHAPES = [(1024, 3072), (16384, 3072), (16384, 4096), (777, 3073)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROTATED_BYTES = 512 << 20


def rotating(shape, dtype):
    """Enough random inputs that none is still in the L2 when its turn comes again."""
    size = shape[0] * shape[1] * dtype.itemsize
    count = max(2, min(64, ROTATED_BYTES // size))
    return [torch.randn(shape, device="cuda").to(dtype) for _ in range(count)]


def medians(runs, inputs, rounds):
    """Milliseconds of each run, in turn, over the inputs in rotation."""
    times = {name: [] for name in runs}
    for i in range(rounds + 3):
        x = inputs[i % len(inputs)]
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run(x)
            end.record()
            end.synchronize()
            if i >= 3:  # warm-up
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(ms) for name, ms in times.items()}


def gelu_rows(rounds):
    for dtype in DTYPES:
        for shape in SHAPES:
            inputs, bias = rotating(shape, dtype), torch.randn(shape[1], device="cuda")
            low = bias.to(dtype)
            truth = F.gelu(inputs[0].double() + bias.double())
            ours = bert_fast.gelu(inputs[0], bias, backend="cuda").double()
            torchs = F.gelu(inputs[0] + low).double()
            errors = [(t - truth).abs().max().item() for t in (ours, torchs)]
            row = {"op": "gelu forward, bias", "shape": shape, "dtype": str(dtype)}
            row["error"], row["torch error"] = errors
            if not errors[0] <= 2 * errors[1]:
                yield row | {"refused": "its error is more than twice PyTorch's: not timed"}
                continue
            if rounds:
                copy = torch.empty_like(inputs[0])
                runs = {
                    "bert_fast cuda": lambda x, b=bias: bert_fast.gelu(x, b, backend="cuda"),
                    "F.gelu(x + b)": lambda x, b=low: F.gelu(x + b),
                    "copy": lambda x, c=copy: c.copy_(x),
                }
                row["ms"] = medians(runs, inputs, rounds)
                row["% of copy"] = 100 * row["ms"]["copy"] / row["ms"]["bert_fast cuda"]
            yield row


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=100)
    options.add_argument("--once", action="store_true", help="check, time nothing (sanitizers)")
    options.add_argument("--json")
    args = options.parse_args()
    rows, refused = [], False
    with torch.no_grad():
        for row in gelu_rows(0 if args.once else args.rounds):
            rows.append(row)
            refused = refused or "refused" in row
            print(json.dumps(row), flush=True)
            if args.json:  # as soon as it exists: time may run out
                result = {"environment": environment(), "rows": rows}
                Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(refused)


if __name__ == "__main__":
    main()
