"""The chips: what bounds a kernel on each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Of a compute capability: what bounds a streaming multiprocessor's kernels, the peaks its
    maker publishes for one board, and what an SM does in a clock."""

    name: str
    shared: int  # bytes a CTA may ask for
    shared_sm: int  # bytes of an SM
    warps: int  # of an SM
    products: str  # the matrix instruction, as a pattern of SASS
    copy: float  # TB/s
    matmul: float  # dense bf16 TFLOP/s
    sms: int
    ghz: float
    tensor: int  # multiplications and additions of bf16 into fp32 that the tensor cores do a clock
    fp32: int  # lanes of FADD, FMUL, FFMA a clock
    packed: int  # lanes of HFMA2, two numbers each
    shared_rate: int = 128  # bytes of shared memory a clock
    mma_share: float = 1.0  # of `tensor`, what mma.sync reaches


# What bounds a kernel: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"; data sheets. What an SM does in a clock:
# - tensor: the data sheets' peaks over 2 x SMs x boost clock; of mma.sync on 9.0 62.9 %, as Luo et
#   al. measured (2024, arXiv 2402.13499).
# - fp32, packed, and the lanes below: CUDA C++ Best Practices Guide, "Throughput of Native
#   Arithmetic Instructions" (results; HFMA2 has two a lane).
# - shared memory: 32 banks of 4 bytes ("Shared Memory" in the Programming Guide); half of it on
#   7.5, as Jia et al. measured (2019, arXiv 1903.07486).
# The clock is the board's boost, which it need not hold: an H100 runs at 1.4 to 1.98 GHz.
KIB, REGISTERS = 1024, 65536
CHIPS = {
    75: Chip("T4", 64 * KIB, 64 * KIB, 32, "HMMA", 0.32, 65,  # in fp16; it has no bf16
             40, 1.59, 512, 64, 64, 64),
    80: Chip("A100", 163 * KIB, 164 * KIB, 64, "HMMA", 2.04, 312, 108, 1.41, 1024, 64, 128),
    89: Chip("RTX 4090", 99 * KIB, 100 * KIB, 48, "HMMA", 1.01, 165, 128, 2.52, 256, 128, 64),
    90: Chip("H100", 227 * KIB, 228 * KIB, 64, "HGMMA", 3.35, 989,
             132, 1.755, 2048, 128, 128, mma_share=0.629),
    100: Chip("B200", 227 * KIB, 228 * KIB, 64, r"UTC\w*MMA", 8.0, 2250, 148, 1.85, 4096, 128, 64),
    120: Chip("RTX 5090", 99 * KIB, 100 * KIB, 48, "HMMA", 1.79, 209, 170, 2.407, 256, 128, 64),
}  # fmt: skip
SCHEDULERS = 4  # of an SM; each issues one instruction of a warp a clock
# Lanes an SM, the same on all of them. 12.0 adds integers at twice that rate; 16-bit conversions
# (F2FP) are assumed to run at it, and what the guide does not list.
ALU, IMAD, MUFU = 64, 64, 16
