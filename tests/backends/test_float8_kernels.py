"""The kernels that round to float8, compiled for the chips that have it."""

import importlib.util

import pytest
from conftest import compiling, json_of

# Layer-norm's and GELU's of BERT-base.
COMPILED = r"""
import json, re, torch
from bert_fast import inspect
from bert_fast.inspect.recording import compile
from bert_fast.kernels import float8_forward

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

found, x, hidden, vector = [], meta(4096, 768), meta(4096, 3072), meta(768)
for chip in (89, 90, 100, 120):
    with inspect.recorded(chip) as launches:
        float8_forward(x, vector, None, x, (vector, vector, 1e-12))
        float8_forward(hidden, meta(3072), "none")
    for launch in launches:
        _, _, spills, sass = compile(launch, chip)
        loads = "LDG.E.128" in sass
        found.append((chip, spills, loads, bool(re.search(r"F2FP\S*\.E4M3", sass))))
print(json.dumps(found))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
def test_they_compile_without_spills():
    """With 16-byte loads and the chip's own conversion, which the interpreter does not have."""
    rows = json_of(compiling("-c", COMPILED))
    assert rows == [[chip, 0, True, True] for chip in (89, 90, 100, 120) for _ in range(2)]
