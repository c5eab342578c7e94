"""What the compilers made of the GPU kernels. Needs no GPU."""

from bert_fast.inspect.recording import CHIPS, Compiled, cuda_kernels, inspect, recorded, table

__all__ = ["CHIPS", "Compiled", "cuda_kernels", "inspect", "recorded", "table"]
