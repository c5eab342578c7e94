"""The counter on small programs of known cost: what is planted shows up, and nothing else does."""

import random

import pytest
import torch

from bert_fast.inspect import CHIPS, Compiled
from bert_fast.inspect.counts import Tile, count, pipe
from bert_fast.inspect.kernels import products_and_loads
from bert_fast.inspect.loops import loops, parse

# One of each pipe, as cuobjdump writes them.
ONE = {
    "fma": ["FFMA R4, R4, R5, R6", "FMUL.FTZ R4, R4, R5", "IMAD.MOV.U32 R4, RZ, RZ, R5",
            "HFMA2.BF16_V2 R4, R4, R5, R6"],
    "alu": ["FMNMX R4, R4, R5, !PT", "LOP3.LUT R4, R4, R5, RZ, 0x3c, !PT", "IADD3 R4, R4, R5, RZ",
            "F2FP.BF16.F32.PACK_AB R4, R5, R4", "FSETP.GT.AND P1, PT, R4, R5, PT"],
    "mufu": ["MUFU.EX2 R4, R4", "MUFU.RCP R4, R4"],
    "shared": ["LDSM.16.M88.4 R4, [R8]", "LDS.128 R4, [R8]", "SHFL.BFLY PT, R4, R4, 0x1, 0x1f",
               "LDGSTS.E.BYPASS.128 [R4], [R8.64]"],
    "global": ["LDG.E.128 R4, [R8.64]", "STG.E.128 [R8.64], R4"],
    "uniform": ["UIADD3 UR4, UR4, 0x1, URZ", "BSYNC B0", "S2R R4, SR_TID.X"],
    "barrier": ["BAR.SYNC.DEFER_BLOCKING 0x0", "WARPSYNC.ALL", "DEPBAR.LE SB0, 0x0"],
    "tensor": ["HMMA.16816.F32.BF16 R4, R8, R12, R4"],
}  # fmt: skip


def listing(*parts):
    """SASS of instructions, of which "L:" names the next one and a branch says "BRA L"."""
    lines, at, named = [text for part in parts for text in part], 0, {}
    for text in lines:
        if text.endswith(":"):
            named[text[:-1]] = f"{16 * at:#x}"
        else:
            at += 1
    code = [text for text in lines if not text.endswith(":")]
    shown = []
    for number, text in enumerate(code):
        *rest, last = text.split(" ")
        shown.append(
            f"        /*{16 * number:04x}*/    {' '.join([*rest, named.get(last, last)])} ;"
        )
    end = f"/*{16 * len(code):04x}*/ BRA {16 * len(code):#x};\n/*{16 * len(code) + 16:04x}*/ NOP;"
    return "\n".join([*shown, end])


def drawn(rng, most=9):
    """(instructions in a drawn order, how many of each pipe)."""
    counts = {name: rng.randrange(1, most) for name in ONE}
    body = [rng.choice(ONE[name]) for name, number in counts.items() for _ in range(number)]
    rng.shuffle(body)
    return body, counts


@pytest.fixture
def rng():
    return random.Random(torch.randint(2**31, ()).item())


def loop(body, name="L"):
    return [f"{name}:", *body, f"@P0 BRA {name}"]


def attention(body, around=()):
    """A kernel that searches, loops over whole tiles, then over the last with more instructions."""
    search = loop(["LDG.E R4, [R8.64]", "ISETP.LT.AND P0, PT, R4, R5, PT"], "S")
    masked = loop([*body, *["FSEL R4, R4, -INF , P1"] * 5], "M")
    return listing(["S2R R4, SR_TID.X"], search, around, loop(body), masked, ["EXIT"])


def test_the_main_loop_is_counted_by_pipe(rng):
    body, counts = drawn(rng)
    around, _ = drawn(rng)
    elements, warps = 64 * 64, rng.choice([4, 8])
    # The products outside of the loops are no reason to count what is beside them.
    found = count(attention(body, around), 90, warps, Tile(elements, 10**6, 2))
    assert found.loop
    assert found.pipes == counts | {"uniform": counts["uniform"] + 1}  # and the branch
    assert found.instructions == len(body) + 1
    assert found.an_element == (len(body) + 1) * 32 * warps / elements
    assert found.executed == counts["tensor"] * 2 * 16 * 8 * 16 * warps


def test_loops_inside_and_the_ways_through_them_are_not_the_loop(rng):
    """As the narrow loads of rows that are not aligned, beside the wide ones."""
    body, _ = drawn(rng)
    narrow = ["@P1 BRA WIDE", *drawn(rng)[0], *loop(drawn(rng)[0], "N"), "BRA ON", "WIDE:"]
    inner = ["IADD3 R4, R4, R5, RZ", *loop(["LDS R4, [R8]"], "I"), "IADD3 R4, R4, R5, RZ"]
    code = listing(["L:"], body, narrow, ["LDS.128 R4, [R8]", "ON:"], ["@P0 BRA L", "EXIT"])
    found = [i.op for i in loops(parse(code))[0]]
    assert len(found) == len(body) + 3  # the branch to it, the wide load, the branch back
    around = loops(parse(listing(loop(inner), ["EXIT"])))  # no way around the inner loop
    assert [len(one) for one in around] == [3, 2]


def test_a_planted_instruction_shows_up(rng):
    body, _ = drawn(rng)
    tile = Tile(64 * 64, 10**6, 2)
    before = count(attention(body), 90, 4, tile)
    outside = count(attention(body, ["FFMA R4, R4, R5, R6"]), 90, 4, tile)
    assert outside.pipes == before.pipes
    for name, examples in ONE.items():
        text = rng.choice(examples)
        after = count(attention([*body, text]), 90, 4, tile)
        assert after.pipes == before.pipes | {name: before.pipes[name] + 1}, text
        assert after.an_element == pytest.approx(before.an_element + 32 * 4 / 64**2)
        assert after.cycles["issue"] == before.cycles["issue"] + 1
        if name in ("fma", "alu", "mufu", "shared", "tensor"):
            assert after.cycles[name] > before.cycles[name]


@pytest.mark.parametrize(
    "product",
    ["HMMA.16816.F32.BF16 R4, R8, R12, R4", "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR24], R24"],
)
def test_planted_redundant_warps_show_up(product):
    """Eight warps on 64 rows, of which four with 16 rows each have them all."""
    rows, cols, depth = 64, 64, 64
    of_a_warp = 2 * 16 * (64 if "HGMMA" in product else 8) * 16
    number = 2 * 2 * rows * cols * depth // 4 // of_a_warp
    body = [*[product] * number, *["MUFU.EX2 R4, R4"] * (rows * cols // 4 // 32)]
    tile = Tile(rows * cols, 2 * 2 * rows * cols * depth, 2, exponentials=True)
    right, wrong = (count(attention(body), 90, warps, tile) for warps in (4, 8))
    assert right.repeated == 1.0
    assert wrong.repeated == 2.0
    assert wrong.an_element == 2 * right.an_element
    assert wrong.ceiling() == pytest.approx(right.ceiling() / 2)
    # Exponentials alone, where the layout makes them again and not the products.
    again = [*body, *["MUFU.EX2 R4, R4"] * (rows * cols // 4 // 32)]
    assert count(attention(again), 90, 4, tile).repeated == 2.0


def test_a_planted_narrow_load_shows_up():
    """Eight loads of two bytes where one of sixteen would do."""
    tile = Tile(1024, bytes=4096)
    rest = ["HADD2.F32 R4, -RZ, R4.H0_H0"] * 8
    right = listing(loop(["LDG.E.128 R4, [R8.64]", *rest]), ["EXIT"])
    wrong = listing(loop([*["LDG.E.U16 R4, [R8.64]"] * 8, *rest]), ["EXIT"])
    wide, narrow = (count(sass, 90, 4, tile) for sass in (right, wrong))
    assert (wide.pipes["global"], narrow.pipes["global"]) == (1, 8)
    assert wide.loaded == narrow.loaded == 16 * 32 * 4
    faults = [
        Compiled("gelu", 0, 1, "gelu.forward", 90, 4, 32, 0, 0, *products_and_loads(s, 90)).faults()
        for s in (right, wrong)
    ]
    assert faults == [[], ["its widest load is 16 bits"]]


def test_rows_without_a_loop_are_counted_whole():
    body = ["LDG.E.128 R4, [R8.64]", *["FFMA R4, R4, R5, R6"] * 30, "STG.E.128 [R8.64], R4", "EXIT"]
    found = count(listing(body), 80, 4, Tile(1024, bytes=4096))
    assert not found.loop
    assert found.instructions == len(body)


def test_the_pipe_that_binds_and_its_ceiling():
    """Of products alone the data sheet's peak; of a lane's exponentials 16 a clock; of memory its
    bandwidth."""
    products = ["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 64
    for chip, board in CHIPS.items():
        # At the boost clock, which for the H100 is not the one of its data sheet.
        assert board.tensor * 2 * board.sms * board.ghz / 1e3 == pytest.approx(
            board.matmul, rel=0.05
        )
        flops = len(products) * 2 * 16 * 8 * 16 * 4
        found = count(listing(loop(products), ["EXIT"]), chip, 4, Tile(4096, flops, 1))
        assert found.binds == "tensor"
        peak = board.tensor * 2 * board.sms * board.ghz / 1e3 * board.mma_share
        assert found.ceiling() == pytest.approx(peak)
        mufu = [*products, *["MUFU.EX2 R4, R4"] * 10000]
        found = count(listing(loop(mufu), ["EXIT"]), chip, 4, Tile(4096, flops, 2))
        assert found.binds == "mufu"
        assert found.cycles_a_tile == 10000 * 4 * 32 / 16
        tensor = found.cycles["tensor"]
        assert found.serial == pytest.approx(tensor + 10000 * 4 * 32 / 16)
        copy = listing(loop(["LDG.E.128 R4, [R8.64]", "STG.E.128 [R8.64], R4"]), ["EXIT"])
        found = count(copy, chip, 4, Tile(1024, bytes=4096))
        assert found.binds == "copy"
        assert found.ceiling() == pytest.approx(board.copy)


def test_every_instruction_has_one_pipe():
    for name, examples in ONE.items():
        for instruction in parse(listing(examples)):
            found = pipe(instruction)
            assert name == ("fma" if found in ("packed", "imad") else found), instruction.op
