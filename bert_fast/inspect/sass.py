"""What a compiled kernel's machine code says."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bert_fast.inspect.chips import CHIPS, KIB, REGISTERS

# Kernels that must use the tensor cores.
PRODUCTS = ("attention.forward", "attention.backward_q", "attention.backward_kv",
            "attention_short.backward", "attention_table.backward",
            "linear.forward", "linear.backward")  # fmt: skip


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

    def faults(self):
        """What no kernel of ours may have."""
        chip, found = CHIPS[self.chip], []
        if self.spills:
            found.append(f"{self.spills} bytes of registers spilled")
        if (self.shared or 0) > chip.shared:
            found.append(f"{self.shared} bytes of shared memory; the chip has {chip.shared}")
        if self.ctas < 1:
            found.append("no CTA of it fits an SM")
        # A tile of fewer than 64 rows, all that 256 columns may leave room for, takes the older
        # tensor-core instruction on any chip.
        small = "of 256" in self.work
        wanted = f"{chip.products}|HMMA" if small else chip.products
        # Triton has no tensor-core path for 7.5.
        products = self.kernel in PRODUCTS and "float32" not in self.work and self.chip >= 80
        if products and not re.fullmatch(wanted, self.products):
            found.append(f"its matrix products are {self.products or 'none'}, not {wanted}")
        if self.widest_load < 128 and self.shared is not None:  # CUDA's have narrow variants
            found.append(f"its widest load is {self.widest_load} bits")
        return found


# A line of SASS:  /*0080*/  @!P0 LDG.E.128 R4, [R2.64] ;
OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
MATRIX = re.compile(r"(HMMA|HGMMA|IMMA|QMMA|UTC\w*MMA)\b")


def _bits(opcode):
    if opcode.startswith("UTMALDG"):
        return 128
    return next((int(part) for part in opcode.split(".") if part in ("64", "128")), 32)


def cuobjdump(*arguments):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run(
        [tool, *map(str, arguments)], capture_output=True, text=True, check=True
    ).stdout
