"""The cached launcher: on a stand-in driver, which compiles for a chip that need not be there, each
launch is of the kernel that Triton itself would have launched, with the same arguments."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)

STAND_IN = """
import json, random, sys
from types import SimpleNamespace
import torch
from bert_fast.bench.stand_in import stand_in
launches = []
current = stand_in(90)
import triton, triton.language as tl
from triton import knobs
from triton.runtime.jit import JITFunction
from bert_fast.kernels import launch

@launch.kernel(do_not_specialize=["count"])
def small(x, y, count, width, scale, ROWS: tl.constexpr, FLAG: tl.constexpr = False):
    tl.store(y + count * width, tl.load(x) * scale)
plain = JITFunction(small.fn, do_not_specialize=["count"])

class Compiled:  # named by all that Triton would compile it for
    packed_metadata, metadata = "packed", SimpleNamespace(target=SimpleNamespace(backend="cuda"))
    def __init__(self, *kind):
        self.function = repr(kind)
    def run(self, *given):
        launches.append(given)
    def launch_metadata(self, *given):
        return "metadata"
def compile(kernel, key, signature, device, constants, options, attrs, warmup):
    compiled = Compiled(signature, device, constants, options, attrs)
    kernel.device_caches[device][0][key] = compiled
    return compiled
JITFunction._do_compile = compile

def seen(kernel, grid, args, constants):
    launches.clear()
    kernel[grid](*args, **constants)
    (given,) = launches  # from the seventh on: metadata, hooks, the kernel's own arguments
    own = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in given[9:]]
    return given[:6], own, [type(a) for a in own]

run = JITFunction.run
def by_triton(grid, args, constants):
    \"\"\"Whether a launch went Triton's own way.\"\"\"
    codes = []
    sys.setprofile(lambda frame, event, _: codes.append(frame.f_code))
    small[grid](*args, **constants)
    sys.setprofile(None)
    return run.__code__ in codes
"""

SAME = """
seed = int(sys.argv[1])
random.seed(seed)
memory = [torch.empty(64, dtype=t) for t in (torch.float32, torch.bfloat16, torch.int64)]
ints = [1, 2, 15, 16, 17, 48, 0, -16, 2**31 - 1, 2**31, 2**33, -(2**31), -(2**31) - 1, True]
def tensor():
    t = random.choice(memory)[random.choice([0, 0, 1, 8]):]
    return torch.nn.Parameter(t, requires_grad=False) if random.random() < 0.2 else t
ours = []
for turn in range(600):
    current["device"], current["stream"] = random.randrange(2), random.randrange(5)
    args = [tensor(), tensor(), random.choice(ints), random.choice(ints),
            random.choice([0.5, 1.0, 2.0, 1, 16])]
    constants = {"ROWS": random.choice([4, 8, 16]), "num_warps": random.choice([4, 8]),
                 "enable_fp_fusion": random.choice([True, False])}
    if random.random() < 0.5:
        constants = {"FLAG": random.random() < 0.5, **constants}
    if random.random() < 0.2:
        constants["scale"] = args.pop()
    constants = dict(random.sample([*constants.items()], len(constants)))
    launch_of = random.choice([(3,), (3, 2), (3, 2, 4)]), args, constants
    wanted = seen(plain, *launch_of)
    for time in ("anew", "known"):
        assert seen(small, *launch_of) == wanted, (seed, time, args, constants)
    ours.append(not by_triton(*launch_of))
args = memory[0], memory[0], 3, 5, 0.5
for first, second in ((4, 2), (2, 4)):  # the same numbers, of other options
    for names in (("num_warps", "num_stages"), ("num_stages", "num_warps")):
        constants = {"ROWS": 4, "FLAG": True, names[0]: first, names[1]: second}
        assert seen(small, (1,), args, constants) == seen(plain, (1,), args, constants)
print(json.dumps(sum(ours)))
"""

OBEYED = """
x = torch.empty(64)
this = (1,), (x, x, 5, 16, 0.5), {"ROWS": 16, "FLAG": True}
found = {"first": by_triton(*this), "second": by_triton(*this)}
def hook(*given, **options):
    pass
for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
    chain.add(hook)
    found.setdefault("hooks", []).append(by_triton(*this))
    chain.remove(hook)
found["unhooked"] = by_triton(*this)
small.add_pre_run_hook(hook)
found["pre-run hook"] = by_triton(*this)
small.pre_run_hooks.clear()
taken = []
JITFunction.run = lambda *args, **options: taken.append(options["grid"])  # an onlooker
small[(1,)](*this[1], **this[2])
JITFunction.run = run
found["onlooker"] = taken
other = (1,), (x, x, 5, 16, 0.5), {"ROWS": 32, "FLAG": True}
Compiled.metadata.target.backend = "hip"
found["another maker"] = [by_triton(*other), by_triton(*other)]
found["again"] = by_triton(*this)
known, launch.knobs = launch.knobs, None
found["a Triton without knobs"] = by_triton(*this)
launch.knobs = known
launch._KNOWN, small._read = "kernel.run(in, another, way)", launch._unknown
launch._as_known.cache_clear()
found["another Triton"] = by_triton(*this)
print(json.dumps(found))
"""


def answer(tmp_path, script, *arguments):
    path = tmp_path / "script.py"  # Triton reads a kernel's source
    path.write_text(STAND_IN + script)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(path), *map(str, arguments)], cwd=ROOT, capture_output=True,
        text=True, check=False, env=env | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_what_is_launched_is_what_triton_would(tmp_path):
    """Over drawn dtypes, alignments, integers, constants, options, devices and streams: the kernel
    compiled for just these, with just these arguments."""
    ours = answer(tmp_path, SAME, torch.randint(10**6, ()).item())
    assert 10 < ours < 600  # the rest have 64-bit integers, or defaults of the kernel's


def test_whoever_looks_on_sees_every_launch(tmp_path):
    assert answer(tmp_path, OBEYED) == {
        "first": True, "second": False, "hooks": [True, True], "unhooked": False,
        "pre-run hook": True, "onlooker": [[1]], "another maker": [True, True], "again": False,
        "a Triton without knobs": True, "another Triton": True,
    }  # fmt: skip
