"""python -m benchmarks.busy: how much longer a model takes beside as many busy processes as there
are threads. Threads that wait for each other must not wait for one that the system has put aside.
"""

import argparse
import contextlib
import subprocess
import sys

import torch
from rich.console import Console

from bert_fast.bench import data, lengths, report
from bert_fast.bench.peers import peers
from bert_fast.bench.run import measure
from bert_fast.bench.works import Model

MOST = 2.5  # times its quiet time
WHO = report.OURS, "ONNX Runtime", "OpenVINO"


@contextlib.contextmanager
def busy(processes):
    running = []
    try:
        for _ in range(processes):
            running.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def works(dtypes):
    mixed = tuple(map(tuple, lengths.draw("uniform", 8, 32, 0.65)))
    minilm = {"name": "MiniLM-L6", "directory": str(data.minilm())}
    for dtype in dtypes:
        for batches in (((16,),), ((32,),), ((128,),), mixed):
            yield Model(**minilm, dtype=dtype, batches=batches)


def beside(work, who, seconds, processes):
    """{"work", "quiet": name -> ms, "busy": name -> ms}"""
    found = {"work": str(work)}
    for name, state in (("quiet", contextlib.nullcontext()), ("busy", busy(processes))):
        with state:
            results = measure(work, who, seconds)["results"]
        found[name] = {peer: result["ms"] for peer, result in results.items() if "ms" in result}
    return found


def ratios(row):
    """name -> its time beside over its quiet time, of those that both were measured of."""
    quiet, beside = row["quiet"], row["busy"]
    return {name: beside[name] / ms for name, ms in quiet.items() if name in beside}


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=8, help="of timing each (default 8)")
    options.add_argument("--json", help="also write everything here")
    args = options.parse_args()
    console, who = Console(width=120), [peer for peer in peers("cpu") if peer.name in WHO]
    processes = torch.get_num_threads()
    result = {"environment": report.environment(), "processes": processes, "rows": []}
    for work in works((torch.float32, torch.int8)):
        row = beside(work, who, args.seconds, processes)
        result["rows"].append(row)
        for name, ratio in ratios(row).items():
            bar = ("met" if ratio <= MOST else "missed") if name == report.OURS else ""
            console.print(
                f"{work}: {name} {row['quiet'][name]:.2f} ms, {ratio:.2f} times beside {bar}"
            )
        if args.json:
            report.write(args.json, result)


if __name__ == "__main__":
    main()
