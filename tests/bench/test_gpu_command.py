"""make gpu without a GPU: it says so; and its running of parts, with stand-ins for them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from bert_fast import cli
from bert_fast.bench.selection import works_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 2
    assert answer.stderr.strip() == (
        "make gpu: no NVIDIA GPU that PyTorch can use here; nothing was run"
    )
    assert not (tmp_path / "out").exists()


def python(code):
    return [sys.executable, "-c", code]


def test_parts_end_at_the_limit_and_keep_what_they_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", 0.5)
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    commands = {
        "good": python("print('first')"),
        "bad": python("print('before'); raise SystemExit(3)"),
        "missing": ["no-such-program"],
        "slow": python(stubborn + "print('partial', flush=True); time.sleep(60)"),
        "late": python("print('never')"),
    }
    status = gpu.run_parts(list(commands), commands, tmp_path, limit=12)
    assert status == {
        "good": "ok", "bad": "failed", "missing": "failed", "slow": "out of time",
        "late": "not started",
    }  # fmt: skip
    assert json.loads((tmp_path / "summary.json").read_text()) == status | {"late": "not started"}
    logs = {name: (tmp_path / f"{name}.log") for name in commands}
    assert "first" in logs["good"].read_text()
    assert "before" in logs["bad"].read_text()
    assert "\npartial\n" in logs["slow"].read_text()
    assert not logs["late"].exists()


def test_checks_run_side_by_side_and_before_what_measures(tmp_path):
    wait = (
        "import pathlib, sys, time\nhere, there = map(pathlib.Path, sys.argv[1:])\nhere.touch()\n"
        "while not there.exists(): time.sleep(0.01)\n"
    )
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    commands = {
        "op": python(f"import os; assert os.path.exists({one!r}) and os.path.exists({other!r})"),
        "test": [*python(wait), one, other],
        "memcheck": [*python(wait), other, one],
    }
    status = gpu.run_parts(list(commands), commands, tmp_path, limit=60)
    assert status == {"op": "ok", "test": "ok", "memcheck": "ok"}


def test_what_checks_leaves_time_for_what_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", 0.5)
    commands = {"test": python("import time; time.sleep(60)"), "op": python("print('measured')")}
    status = gpu.run_parts(list(commands), commands, tmp_path, limit=20)
    assert status == {"test": "out of time", "op": "ok"}


def test_the_parts(tmp_path):
    """That name what there is: test files, and what bench's own parser takes."""
    commands = gpu.parts(tmp_path)
    assert list(commands)[:5] == list(gpu.CHECKS)
    for name, command in commands.items():
        if name in gpu.CHECKS:
            assert all((ROOT / part).exists() for part in command if part.startswith("tests"))
        else:
            args = cli.parser().parse_args(command[command.index("bert_fast.cli") + 1 :])
            args.device = "cpu"
            assert list(works_of(args))
