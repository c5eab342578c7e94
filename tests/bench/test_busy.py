"""benchmarks/busy.py: what is measured quietly, and beside busy processes."""

import subprocess

import torch

from benchmarks import busy, readme
from bert_fast.bench import report
from bert_fast.bench.works import Gelu

GELU = Gelu(dtype=torch.float32)


def test_busy_processes_run_while_it_is_measured_and_no_longer(monkeypatch, tmp_path):
    started, seen = [], []

    def start(command, popen=subprocess.Popen):
        started.append(popen(command))
        return started[-1]

    def measure(work, who, seconds):
        seen.append([process.poll() for process in started])
        ours = 3.0 if len(seen) == 1 else 6.6
        return {"results": {"bert_fast": {"ms": ours}, "ONNX Runtime": {"refused": "wrong"}}}

    monkeypatch.setattr(busy.subprocess, "Popen", start)
    monkeypatch.setattr(busy, "measure", measure)
    row = busy.beside(GELU, [], 1.0, 2)
    assert seen == [[], [None, None]]  # nobody; two that run
    assert all(process.poll() is not None for process in started)
    assert row == {"work": str(GELU), "quiet": {"bert_fast": 3.0}, "busy": {"bert_fast": 6.6}}
    facts = {"device": "D", "threads": 2, "cpu kernels": "avx2", "torch": "2", "transformers": "5",
             "date": "today", "commit": "abc"}  # fmt: skip
    (tmp_path / "cpu").mkdir()
    result = {"environment": facts, "processes": 2, "rows": [row]}
    report.write(tmp_path / "cpu" / "busy.json", result)
    assert f"| {GELU} | 3, 6.6 | 2.20 |" in readme.tables(tmp_path)
