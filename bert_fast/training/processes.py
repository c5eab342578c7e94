"""The processes of one run: DDP and FSDP2 by torch.distributed."""

import contextlib
import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# What must not differ between a run and its resumption; the rest may (more steps would change the
# learning rate that earlier steps had).
BINDING = (
    "max_length", "batch_tokens", "steps", "optimizer", "lr", "warmup", "weight_decay", "clip",
    "whole_words", "held_out", "seed", "dropout", "no_next_sentence",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """The processes that train together: torchrun's, or this one alone."""

    rank: int
    size: int
    device: torch.device
    waiting: Any = None  # of torch.distributed, with no end to how long it waits

    @classmethod
    @contextlib.contextmanager
    def join(cls, device):
        size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            if not torch.cuda.is_available():
                raise ValueError("device is cuda, but torch sees no CUDA device")
            torch.cuda.set_device(local)
            device = f"cuda:{local}"
        device = torch.device(device)
        if size > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            if size == 1:
                yield cls(0, 1, device)
            else:
                waiting = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=365))
                yield cls(dist.get_rank(), size, device, waiting)
        finally:
            if size > 1:
                dist.destroy_process_group()

    def sum(self, numbers):
        """Of all processes' tensors."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def first(self, do, *args):
        """Lets the first process ``do`` something, while the others wait, be it for hours."""
        if self.rank == 0:
            do(*args)
        if self.size > 1:
            dist.barrier(self.waiting)
