"""Time that calls take of the CPU which launches them: microseconds a layer, and beside the layers.

At small batches a GPU waits for its host, so this decides. On a GPU it is wall time: the tensors
are so small that the GPU waits, and autograd's backward runs in a thread of its own there.
Without a GPU the whole of Triton's path on the host runs on a stand-in driver, for tensors of a few
numbers on the CPU; backward runs in the thread that asks for it, whose own time is taken; the
products of linear layers are left out in inference. Ratios to trust, then, not numbers.
"""

import contextlib
import importlib
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import bert_fast
from bert_fast.backends import choice, resolve_device
from bert_fast.bench import report
from bert_fast.bench.stand_in import stand_in
from bert_fast.extras import require

SHALLOW, DEEP = 2, 10  # layers; what differs between the two is layers'
PEER = "Hugging Face, sdpa"
DIRECTIONS = ("inference", "training")


def add_parser(levels):
    text = "the time that calls take of the CPU: a layer, and beside the layers"
    sub = levels.add_parser("host", help=text, description=text)
    sub.set_defaults(function=run)
    sub.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="default: the GPU where there is one; cpu: Triton on a stand-in driver",
    )  # fmt: skip
    sub.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    sub.add_argument("--json", help="write the results to this file")


def run(args):
    """Measures and prints. Returns 0."""
    device = resolve_device(args.device)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    result = measure(device, args.rounds)
    facts = report.environment(device)  # of the threads that it ran on
    console = Console(width=None if Console().is_terminal else 120)
    console.print(report.title(facts))
    where = "on the GPU" if device == "cuda" else "on a stand-in driver: trust the ratios alone"
    table = Table(title=f"Host time, {where}")
    for column in ("", "", "us a layer", f"over {PEER}", "us beside the layers"):
        table.add_column(column, justify="right" if "us" in column or "over" in column else "left")
    for direction, found in result.items():
        for name, (layer, beside) in found.items():
            ratio = layer / found[PEER][0]
            table.add_row(direction, name, f"{layer:,.0f}", f"{ratio:.2f}", f"{beside:,.0f}")
    console.print(table)
    if args.json:
        report.write(
            args.json,
            {"level": "host", "device": device, "environment": facts, "microseconds": result},
        )
    return 0


def measure(device, rounds=15):
    """direction -> contestant -> (microseconds a layer, and beside the layers): of the least times
    of rounds in which the contestants take turns. On "cpu" this process is left on the stand-in."""
    require("transformers", "bench host")
    if device == "cpu":
        _stand_in()
    found = {}
    for direction in DIRECTIONS:
        with _without_products() if _is_left_out(device, direction) else contextlib.nullcontext():
            calls = {
                (name, layers): _call(make(layers), device, direction)
                for name, make in _makers().items()
                for layers in (SHALLOW, DEEP)
            }
            number = 20 if direction == "inference" else 4
            times = _least_times(calls, rounds, number, _clock(device))
        found[direction] = {}
        for name in _makers():
            few, many = times[name, SHALLOW], times[name, DEEP]
            layer = (many - few) / (DEEP - SHALLOW)
            found[direction][name] = layer, few - SHALLOW * layer
    return found


def _is_left_out(device, direction):
    return device == "cpu" and direction == "inference"


def _clock(device):
    return time.perf_counter if device == "cuda" else time.thread_time


def _least_times(calls, rounds, number, clock):
    """Microseconds a call; ``number`` at a time, on a GPU as many as it queues."""
    least = dict.fromkeys(calls, float("inf"))
    for turn in range(rounds + 1):  # the first compiles
        for name, call in calls.items():
            for _ in range(3):
                call()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
                number = min(number, 3)
            begin = clock()
            for _ in range(number):
                call()
            if turn:
                least[name] = min(least[name], (clock() - begin) / number * 1e6)
    return least


def _makers():
    import transformers

    sizes = {
        "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 256, "vocab_size": 100,
        "max_position_embeddings": 128,
    }  # fmt: skip

    def peer(layers):
        config = transformers.BertConfig(num_hidden_layers=layers, **sizes)
        return transformers.BertModel(config, add_pooling_layer=False)

    def ours(layers):
        config = bert_fast.BertConfig(num_hidden_layers=layers, **sizes)
        return bert_fast.BertModel(config, add_pooling_layer=False)

    return {
        PEER: peer,
        "accelerate": lambda layers: bert_fast.accelerate(peer(layers)),
        "BertModel": ours,
    }


def _call(model, device, direction):
    """A function that calls the model, and in training its backward."""
    # A CPU multiplies small matrices of bfloat16 slowly, and launches nothing faster for it.
    dtype = torch.float32 if device == "cpu" and direction == "training" else torch.bfloat16
    model = model.to(device, dtype).train(direction == "training")
    ids = torch.randint(1, 99, (1, 8), device=device)
    mask = torch.ones_like(ids)
    parameters = list(model.parameters())

    def infer():
        with torch.inference_mode():
            model(ids, mask)

    def train():
        model(ids, mask).last_hidden_state.sum().backward()
        for parameter in parameters:
            parameter.grad = None

    return infer if direction == "inference" else train


def _stand_in():
    """Triton on CPU tensors by the stand-in driver, and our code as if they were on a GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("bench host measures Triton's launches: unset TRITON_INTERPRET")
    require("triton", "bench host without a GPU")
    torch.set_num_threads(1)
    stand_in()
    from bert_fast.kernels import common

    common.compiling_for = 90
    choice.AUTO["cpu"] = ("triton", "eager")
    choice.interpreted = lambda name: name == "triton"
    for name in ("hugging_face", "models.bert"):  # those that are told
        importlib.import_module(f"bert_fast.{name}")
    as_on_a_gpu = {"can_reuse_memory": False, "is_concrete": False, "product_adds_bias": True}
    for name, value in as_on_a_gpu.items():
        for module in [m for n, m in sys.modules.items() if n.startswith("bert_fast.")]:
            if name in vars(module):
                setattr(module, name, lambda tensor, value=value: value)


@contextlib.contextmanager
def _without_products():
    linear = F.linear

    def empty(x, weight, bias=None):
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    F.linear = empty
    try:
        yield
    finally:
        F.linear = linear
