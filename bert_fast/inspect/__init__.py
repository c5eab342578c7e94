"""What the compilers made of the GPU kernels. Needs no GPU; measures no time."""

from bert_fast.inspect.chips import CHIPS
from bert_fast.inspect.kernels import cuda_kernels, inspect, table
from bert_fast.inspect.recording import recorded
from bert_fast.inspect.sass import Compiled

__all__ = ["CHIPS", "Compiled", "cuda_kernels", "inspect", "recorded", "table"]
