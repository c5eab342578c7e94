"""What a compiled kernel's machine code says."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bert_fast.inspect.chips import CHIPS, KIB, REGISTERS
from bert_fast.inspect.counts import Counts
from bert_fast.inspect.grid import Grid

# Kernels that must use the tensor cores.
PRODUCTS = ("attention.forward", "attention.backward_q", "attention.backward_kv",
            "attention_short.backward", "attention_table.backward", "linear.forward")  # fmt: skip


@dataclass
class Compiled:
    """What a launch was compiled to."""

    work: str
    flops: int
    bytes: int
    kernel: str
    chip: int
    num_warps: int
    registers: int
    shared: int | None  # bytes; None: CUDA C++ asks for it at the launch
    spills: int  # bytes of local memory a thread
    products: str  # the instruction of its matrix products, or ""
    widest_load: int  # bits, of a thread's load from global memory
    counts: Counts | None = None  # of its main loop; None: not counted
    grid: Grid | None = None  # how much of the launch is work
    moved: int = 0  # bytes of the launch's tensors; 0: not known

    @property
    def ctas(self):
        """CTAs that an SM holds at once."""
        chip = CHIPS[self.chip]
        per_warp = -(-self.registers * 32 // 256) * 256  # how they are handed out
        by_registers = REGISTERS // (per_warp * self.num_warps)
        by_shared = chip.shared_sm // ((self.shared or 0) + KIB)  # 1 KiB is the system's
        return min(by_registers, by_shared, chip.warps // self.num_warps, 32)

    @property
    def possible_us(self):
        """The least microseconds that the board's peaks allow for the work (fp32: the bytes')."""
        chip = CHIPS[self.chip]
        products = 0 if "float32" in self.work else self.flops / chip.matmul / 1e6
        return max(self.bytes / chip.copy / 1e6, products)

    @property
    def best_us(self):
        """The least microseconds that the main loop's counts and the grid allow, and the bytes."""
        if not (self.counts and self.grid):
            return None
        chip = CHIPS[self.chip]
        computed = self.grid.microseconds(self.counts.cycles_a_tile, chip.ghz)
        return max(computed, self.moved / chip.copy / 1e6)

    @property
    def over_least(self):
        """Bytes moved over the least possible, of what goes through rows once."""
        rows = self.counts and not self.counts.tile.products and self.moved
        return self.moved / self.bytes if rows else None

    @property
    def in_flight(self):
        """Bytes of one turn that an SM's CTAs ask global memory for, in lanes past a row's end too;
        None where memory is copied beside the products."""
        if not (self.counts and self.grid) or self.counts.tile.products:
            return None
        return self.counts.loaded * min(self.ctas, -(-self.grid.ctas // self.grid.sms))

    def faults(self):
        """What no kernel of ours may have."""
        chip, found = CHIPS[self.chip], []
        if self.spills:
            found.append(f"{self.spills} bytes of registers spilled")
        if (self.shared or 0) > chip.shared:
            found.append(f"{self.shared} bytes of shared memory; the chip has {chip.shared}")
        if self.ctas < 1:
            found.append("no CTA of it fits an SM")
        # A tile of fewer than 64 rows, all that 256 columns may leave room for, or 32 beside a
        # position bias, takes the older tensor-core instruction on any chip.
        small = "of 256" in self.work or re.search(r"of 32\b.*position bias", self.work)
        wanted = f"{chip.products}|HMMA" if small else chip.products
        # Triton has no tensor-core path for 7.5.
        products = self.kernel in PRODUCTS and "float32" not in self.work and self.chip >= 80
        if products and not re.fullmatch(wanted, self.products):
            found.append(f"its matrix products are {self.products or 'none'}, not {wanted}")
        if self.widest_load < 128 and self.shared is not None:  # CUDA's have narrow variants
            found.append(f"its widest load is {self.widest_load} bits")
        return found


def leanest(configurations):
    """Of one kernel's :class:`Compiled` configurations the one of the fewest instructions an
    element; without spills, where there is one that fits the chip."""
    return min(configurations, key=lambda c: (c.ctas < 1, c.spills > 0, c.counts.an_element))


OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def cuobjdump(*arguments):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run(
        [tool, *map(str, arguments)], capture_output=True, text=True, check=True
    ).stdout
