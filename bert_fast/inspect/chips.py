"""The chips: what bounds a kernel on each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Of a compute capability: what bounds a streaming multiprocessor's kernels, and the peaks its
    maker publishes for one board."""

    name: str
    shared: int  # bytes a CTA may ask for
    shared_sm: int  # bytes of an SM
    warps: int  # of an SM
    products: str  # the matrix instruction, as a pattern of SASS
    copy: float  # TB/s
    matmul: float  # dense bf16 TFLOP/s


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; data sheets.
KIB, REGISTERS = 1024, 65536
CHIPS = {
    75: Chip("T4", 64 * KIB, 64 * KIB, 32, "HMMA", 0.32, 65),  # in fp16; it has no bf16
    80: Chip("A100", 163 * KIB, 164 * KIB, 64, "HMMA", 2.04, 312),
    89: Chip("RTX 4090", 99 * KIB, 100 * KIB, 48, "HMMA", 1.01, 165),
    90: Chip("H100", 227 * KIB, 228 * KIB, 64, "HGMMA", 3.35, 989),
    100: Chip("B200", 227 * KIB, 228 * KIB, 64, r"UTC\w*MMA", 8.0, 2250),
    120: Chip("RTX 5090", 99 * KIB, 100 * KIB, 48, "HMMA", 1.79, 209),
}
