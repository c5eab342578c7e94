"""One of two processes that fine-tune together, a run after another; see test_finetune_processes.

python two_processes.py RANK FOLDER PORT...
"""

import os
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

import drawn  # noqa: E402

from bert_fast.training.finetune import finetune  # noqa: E402

torch.optim.AdamW = drawn.SteadyAdamW
rank, folder, *ports = sys.argv[1:]
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
for task, port in zip(drawn.TASKS, ports, strict=True):
    os.environ["MASTER_PORT"] = port
    finetune(drawn.shared_settings(task, Path(folder), "two"))
