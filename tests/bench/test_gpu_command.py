"""make gpu without a GPU: it says so; and its running of parts, with stand-ins for them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import parts, run_parts

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


def test_parts_end_at_the_limit_and_keep_what_they_wrote(tmp_path):
    commands = {
        "good": [python("print('first')"), python("print('second')")],
        "bad": [python("print('before'); raise SystemExit(3)"), python("print('never')")],
        "missing": [["no-such-program"]],
        "slow": [python("import time; print('partial', flush=True); time.sleep(60)")],
        "late": [python("print('never')")],
    }
    status = run_parts(list(commands), commands, tmp_path, limit=4)
    assert status == {
        "good": "ok", "bad": "failed", "missing": "failed", "slow": "out of time",
        "late": "not started",
    }  # fmt: skip
    assert json.loads((tmp_path / "summary.json").read_text()) == status
    logs = {name: (tmp_path / f"{name}.log") for name in commands}
    assert "first" in logs["good"].read_text()
    assert "second" in logs["good"].read_text()
    assert "never" not in logs["bad"].read_text().replace("print('never')", "")
    assert "\npartial\n" in logs["slow"].read_text()
    assert not logs["late"].exists()


def test_every_part_names_something_that_exists(tmp_path):
    for commands in parts(tmp_path).values():
        for command in commands:
            if "-m" in command and command[command.index("-m") + 1].startswith("benchmarks."):
                module = command[command.index("-m") + 1].replace(".", "/")
                assert (ROOT / f"{module}.py").is_file()
