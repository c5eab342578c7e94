"""The processes of one run: DDP and FSDP2 by torch.distributed; what a resumed run
starts from."""

import contextlib
import datetime
import itertools
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

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

    def share(self, value):
        """What the first process has, to all."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, 0, self.waiting)
        return values[0]

    def gather(self, value):
        """[what each process has], to all."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, self.waiting)
        return values

    def replicate(self, model, **options):
        """The model, whose gradients are the mean of all processes'."""
        if self.size == 1:
            return model
        devices = None if self.device.type == "cpu" else [self.device]
        return DistributedDataParallel(model, device_ids=devices, **options)


def cut(whole, parts):
    """A slice in as many, as even as can be; empty where there are more parts than rows."""
    edges = [whole.start + (whole.stop - whole.start) * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def dropout_seed(*numbers):
    """Dropout depends on nothing that a resumed run would have to remember."""
    torch.manual_seed(hash(numbers) % 2**63)


def read_state(path, settings):
    """A checkpoint of a run.

    Raises:
        ValueError: it cannot be read; or naming a setting that was another than in ``settings``.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything
        raise ValueError(f"{path} cannot be read: {error}") from error
    for name, mine in settings.items():
        if (value := state["settings"].get(name, False)) != mine:
            raise ValueError(f"--resume: {name} was {value}, and is {mine} now")
    return state
