"""What the compilers made of the GPU kernels: a model of the chip. Needs no GPU; measures no time.

recording (Triton's launches, compiled for any chip) and kernels (both kinds) read machine code;
loops finds what runs most, counts puts it on the chip's pipes (chips has their rates), tiles knows
how much work that is, grid what whole launches lose, layer what a layer takes; peers counts others'
kernels, tutorial and inductor those that must be made to launch first; tables prints.
"""

from bert_fast.inspect.chips import CHIPS
from bert_fast.inspect.kernels import cuda_kernels, inspect
from bert_fast.inspect.peers import others
from bert_fast.inspect.recording import recorded
from bert_fast.inspect.sass import Compiled
from bert_fast.inspect.tables import costs, layer_table, row, table

__all__ = ["CHIPS", "Compiled", "costs", "cuda_kernels", "inspect", "layer_table", "others",
           "recorded", "row", "table"]  # fmt: skip
