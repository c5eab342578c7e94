"""Others' kernels: found by name, counted where they are, and named where they are not."""

import importlib.util
import types
from pathlib import Path

import pytest

from bert_fast import cli
from bert_fast.inspect import peers as module

ROWS, COLS = 128, 64
PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR24], R24"
# As c++filt gives them.
NAMES = {
    "FlashAttention-3": "FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2, "
    "cute::tuple<cute::C<1>, cute::C<1>, cute::C<1> >, "
    "cute::tuple<cute::C<{rows}>, cute::C<{cols}>, cute::C<64> >, 64, "
    "cutlass::bfloat16_t, float, cutlass::arch::Sm90, {flag}, false, false, false, false, false, "
    "false, false, true, false, false, false>, flash::CollectiveEpilogueFwd<...> > >",
    "FlashAttention-2": "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<"
    "64, {rows}, {cols}, 4, false, false, cutlass::bfloat16_t, "
    "Flash_kernel_traits<64, {rows}, {cols}, 4, cutlass::bfloat16_t> >, "
    "{flag}, false, false, false, true, true, false, false>(flash::Flash_fwd_params)",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_librarys_kernel_is_counted(name, monkeypatch):
    library = module.LIBRARIES[name]
    right, wrong = (NAMES[name].format(rows=ROWS, cols=COLS, flag=f) for f in ("false", "true"))
    warps = ROWS // library.rows
    of_a_warp = 2 * 16 * 64 * 16
    number = 2 * 2 * ROWS * COLS * 64 // warps // of_a_warp
    body = [PRODUCT] * number + ["FFMA R4, R4, R5, R6"] * 100 + ["@P0 BRA 0x0", "EXIT"]
    sass = "\n".join(f"/*{16 * i:04x}*/ {text} ;" for i, text in enumerate(body))

    def cuobjdump(flag, *arguments):
        if flag == "-res-usage":
            return "".join(f"Function {n}:\n  REG:{r} STACK:0 SHARED:0\n" for n, r in
                           [("_causal", 90), ("_plain", 100)])  # fmt: skip
        assert arguments[-2] == "_plain"
        return f"Function : _plain\n{sass}"

    real = module.subprocess.run
    monkeypatch.setattr(module, "cuobjdump", cuobjdump)
    monkeypatch.setattr(
        module.subprocess, "run",
        lambda *args, **options: real(["cat"], **options | {"input": f"{wrong}\n{right}"}),
    )  # fmt: skip
    chip = next(iter(library.archs))
    (found,) = module.attention(name, library, Path("library.so"), chip)
    assert (found.registers, found.num_warps) == (100, warps + library.loading)
    assert found.counts.repeated == 1
    assert found.counts.an_element == (number + 101) * 32 * warps / (ROWS * COLS)
    assert not list(module.attention(name, library, Path("library.so"), 75))


def test_what_is_not_there_is_said_by_name(monkeypatch, capsys):
    util = types.SimpleNamespace(find_spec=lambda name: None)
    monkeypatch.setattr(module, "importlib", types.SimpleNamespace(util=util))
    monkeypatch.setattr("bert_fast.inspect.inspect", lambda *_: [])
    monkeypatch.setattr("bert_fast.inspect.cuda_kernels", lambda *_: [])
    assert cli.main(["inspect", "--chips", "90", "--peers"]) == 0
    shown = capsys.readouterr().out
    for name, package in [
        ("FlashAttention-2", "flash_attn_2_cuda"), ("FlashAttention-3", "fa3_fwd"),
        ("Liger", "liger_kernel"),
    ]:  # fmt: skip
        assert f"{name}: not counted, {package} is not installed" in shown
    assert "torch's Inductor: not counted" in shown


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="Liger is not here")
@pytest.mark.full
def test_liger():
    found = module.liger(90)
    assert found.over_least == pytest.approx(1, abs=0.01)
    assert 20 < found.counts.an_element < 60
