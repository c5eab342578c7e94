"""Two processes that fine-tune together give the numbers of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import drawn
import numpy as np
import pytest
import torch
from drawn import seeded  # noqa: F401
from safetensors.torch import load_file

from bert_fast.training.finetune import finetune


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for some in sockets:
        some.bind(("127.0.0.1", 0))
    ports = [some.getsockname()[1] for some in sockets]
    for some in sockets:
        some.close()
    return ports


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder of the runs of every task by two processes; what they said."""
    folder = tmp_path_factory.mktemp("both")
    for task in drawn.TASKS:
        one = [drawn.row(task)]
        drawn.write(folder / f"test-{task}", task, one)
        drawn.shared_settings(task, folder, "two")  # makes the files that are shared
    ports = map(str, free_ports(len(drawn.TASKS)))
    command = [sys.executable, str(Path(drawn.__file__).parent / "two_processes.py")]
    arguments = [str(folder), *ports]
    processes = [
        subprocess.Popen(
            [*command, rank, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        for process in processes:
            said, _ = process.communicate(timeout=240)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.mark.parametrize("task", drawn.TASKS)
def test_two_processes_are_one(both, task, monkeypatch):
    """Losses, steps, figures, and the weights that are saved: at most a thousandth as far apart as
    training moves them."""
    trained = []

    def optimizer(groups, **options):
        trained.extend((p, p.detach().clone()) for group in groups for p in group["params"])
        return drawn.SteadyAdamW(groups, **options)

    monkeypatch.setattr(torch.optim, "AdamW", optimizer)
    one, two = both / f"one-{task}", both / f"two-{task}"
    finetune(drawn.shared_settings(task, both, "one"))
    wanted, found = drawn.records(one), drawn.records(two)
    assert [record["step"] for record in found] == [record["step"] for record in wanted]
    np.testing.assert_allclose(
        [record["loss"] for record in found], [record["loss"] for record in wanted], rtol=1e-4
    )
    wanted, found = (load_file(out / "model.safetensors") for out in (one, two))
    assert wanted.keys() == found.keys()
    moved = torch.cat([(now.detach() - then).flatten() for now, then in trained])
    apart = torch.cat([(found[name] - wanted[name]).flatten() for name in wanted])
    assert apart.norm() < 1e-3 * moved.norm()
    assert not (two / "training_state.pt").exists()
    assert json.loads((two / "metrics.json").read_text())["settings"]["task"] == task
