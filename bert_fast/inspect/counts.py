"""What a kernel's main loop costs by its instructions: how many on which pipe, how many an element
of the tile, what warps repeat; and the speed that these allow at most."""

import collections
import re
from dataclasses import dataclass, field

from bert_fast.inspect.chips import ALU, CHIPS, IMAD, MUFU, SCHEDULERS
from bert_fast.inspect.loops import MATRIX, main_loop, parse

# Where an instruction runs: the first pattern that all of its name matches. imad and packed are the
# fma pipe's, at rates of their own.
PIPES = {
    "tensor": MATRIX.pattern,
    "mufu": r"MUFU|I2F|F2I|F2F|FRND|POPC|FLO|BREV|FCHK",
    "packed": r"HFMA2|HADD2|HMUL2|HMNMX2|HSET2|HSETP2",
    "fma": r"FADD|FMUL|FFMA|FADD2|FMUL2|FFMA2|FSWZADD",
    "imad": r"IMAD|IDP|IMUL",
    "shared": r"LDS|STS|LDSM|STSM|LDGSTS|SHFL|ATOMS|MOVM|LDT|STT|LDTM|STTM",
    "global": r"LDG|STG|LD|ST|RED|ATOM|ATOMG|LDL|STL|UTMA\w*|UBLKCP|UBLKRED|REDG|LDC|CCTL",
    "barrier": r"BAR|SYNCS|DEPBAR|LDGDEPBAR|WARPSYNC|WARPGROUP|MEMBAR|FENCE|ERRBAR|NANOSLEEP"
    r"|ARRIVES|UCGABAR\w*|ELECT|UTCBAR",
    "uniform": r"BRA|BRX|BSSY|BSYNC|BREAK|CALL|RET|EXIT|NOP|YIELD|WARP|KILL|BPT|BMOV|PREEXIT"
    r"|ACQBULK|U[A-Z0-9]+|R2UR|S2UR|S2R|CS2R|VOTEU|REDUX",  # and control
    "alu": r".*",  # comparisons, selections, logic, integer additions, moves, 16-bit conversions
}
SHOWN = ("tensor", "fma", "alu", "mufu", "shared", "global", "uniform", "barrier")


def pipe(instruction):
    return next(p for p, names in PIPES.items() if re.fullmatch(names, instruction.name))


def shape(instruction):
    """(m, n, k) of a warp's part of a matrix product; None where the opcode does not say (10.0)."""
    if found := re.search(r"[HI]MMA\.(\d\d)(8)(\d+)", instruction.op):
        return tuple(map(int, found.groups()))
    if instruction.name == "HGMMA":  # four warps' 64 rows
        _, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", instruction.op).groups())
        return 16, n, k
    return None


def lane_bits(op):
    """Bits that a lane moves from or to memory."""
    name, *parts = op.split(".")
    if name in ("LDSM", "STSM"):
        return 32 * int(next((p for p in parts if p in ("2", "4")), 1))
    if name == "UTMALDG":  # one thread's copy of a tile
        return 128
    sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    return next((sizes[p] for p in parts if p in sizes and name != "SHFL"), 32)


@dataclass(frozen=True)
class Tile:
    """What a CTA does in a turn of its main loop; without one, in all."""

    elements: int  # scores of attention; numbers of a layer-norm's or GELU's rows
    flops: int = 0  # of matrix products, counted once
    products: int = 0  # matrix products
    bytes: float = 0.0  # of the least that must be moved, what falls to it
    nested: bool = False  # the products are a loop of one turn inside of the main one
    exponentials: bool = False  # each element has one, and no branch another
    loops: int = 1  # main loops that go through the same tile one after the other


@dataclass(frozen=True)
class Counts:
    """Of a main loop."""

    chip: int
    num_warps: int
    tile: Tile
    loop: bool  # else the whole kernel
    pipes: dict  # instructions of a warp by pipe
    executed: int  # FLOPs of a CTA's matrix instructions; 0 where opcodes do not say
    exponentials: int  # ex2 instructions of a warp
    loaded: int  # bytes that a CTA asks global memory for
    cycles: dict = field(default_factory=dict)  # of an SM by pipe

    @property
    def instructions(self):
        """Of a warp."""
        return sum(self.pipes.values())

    @property
    def an_element(self):
        """Instructions of a lane for each element of the tile."""
        return self.instructions * 32 * self.num_warps / self.tile.elements

    @property
    def repeated(self):
        """How often the tile is computed: above 1 where warps do the same work as others."""
        times = self.executed / self.tile.flops if self.executed else 1.0
        # A row's maximum has one, too: whole times count. Without tensor cores many lanes have it.
        if self.tile.exponentials and self.pipes["tensor"]:
            of_all = self.exponentials * 32 * self.num_warps / self.tile.elements
            times = max(times, of_all // 1)
        return max(times, 1.0)

    @property
    def binds(self):
        """The pipe that takes longest; "copy" where memory does."""
        slowest = max(self.cycles, key=self.cycles.get)
        return "copy" if self._copy > self.cycles[slowest] else slowest

    @property
    def _copy(self):
        """Cycles that the board's bandwidth gives the tile's bytes."""
        chip = CHIPS[self.chip]
        return self.tile.bytes / (chip.copy * 1e3 / chip.sms / chip.ghz)

    @property
    def cycles_a_tile(self):
        """The least: all else runs beside the pipe that binds."""
        return max(*self.cycles.values(), self._copy)

    @property
    def serial(self):
        """Cycles a tile where the tensor cores and the slowest other pipe take turns."""
        others = [number for name, number in self.cycles.items() if name != "tensor"]
        return max(self.cycles.get("tensor", 0.0) + max(others), self._copy)

    def ceiling(self, cycles=None):
        """TFLOP/s of products, TB/s of others, that so many cycles a tile (the least) give."""
        chip, work = CHIPS[self.chip], self.tile.flops or self.tile.bytes
        return work / (cycles or self.cycles_a_tile) * chip.sms * chip.ghz / 1e3


def count(sass, chip, num_warps, tile):
    """:class:`Counts` of a kernel's listing."""
    code, loop = main_loop(parse(sass), tile.products, tile.nested, tile.loops)
    pipes, executed = collections.Counter(), 0
    cycles = collections.Counter({"issue": len(code) * num_warps / SCHEDULERS})
    for i in code:
        name = pipe(i)
        pipes["fma" if name in ("packed", "imad") else name] += 1
        executed += _add(cycles, name, i, CHIPS[chip], num_warps)
    if pipes["tensor"] and not executed:
        cycles["tensor"] = tile.flops / 2 / CHIPS[chip].tensor
    loads = sum(lane_bits(i.op) // 8 for i in code if i.name in ("LDG", "LDGSTS"))
    exponentials = sum(i.op.startswith("MUFU.EX2") for i in code)
    return Counts(
        chip, num_warps, tile, loop, {name: pipes[name] for name in SHOWN}, executed, exponentials,
        loads * 32 * num_warps, dict(cycles),
    )  # fmt: skip


def _add(cycles, name, instruction, chip, warps):
    """Adds what an instruction of each warp holds an SM's pipes for; returns the FLOPs."""
    lanes = {"fma": chip.fp32, "packed": chip.packed, "imad": chip.fp32, "alu": ALU, "mufu": MUFU}
    if name in lanes:
        cycles["fma" if name in ("packed", "imad") else name] += 32 * warps / lanes[name]
    if name == "imad":  # half of the fma pipe, where it has 128 lanes
        cycles["imad"] += 32 * warps / IMAD
    elif name == "shared":
        cycles["shared"] += 4 * warps * lane_bits(instruction.op) / chip.shared_rate
    elif name == "tensor" and (size := shape(instruction)):
        m, n, k = size
        share = chip.mma_share if instruction.name == "HMMA" else 1.0
        size = 2 if "TF32" in instruction.op else 1  # at half the rate, of twice the bytes
        cycles["tensor"] += m * n * k * warps * size / (chip.tensor * share)
        if instruction.name == "HGMMA":  # four warps read the second operand once, and the first
            rows = n + 64 * bool(re.match(r"R\w+, gdesc", instruction.operands))
            cycles["shared"] += rows * k * 2 * size * warps / 4 / chip.shared_rate
        return 2 * m * n * k * warps
    return 0
