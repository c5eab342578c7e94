"""Padding is dropped once, before the first layer, and put back once, after the last.

ByteTransformer's idea (Zhai et al. 2023): a batch of B padded rows of S tokens becomes the real
tokens alone, one sequence after another, with ``cu_seqlens`` (B + 1 offsets) to tell them apart.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def is_captured(device):
    """Whether a CUDA graph captures what is done on a device now, by its own current stream."""
    if device.type != "cuda":
        return False
    if device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a (batch, seqlen) batch are.

    cu_seqlens: int32 (batch + 1,), offsets of the sequences among the packed tokens.
    max_seqlen: at least the longest sequence.
    index: int64 (total_tokens,), each packed token's place in the flattened batch; in a buffer of
        fixed capacity the rows past the last token point one past the batch's end. None where
        every token is real and packing is a reshape.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    index: Tensor | None
    batch: int
    seqlen: int
    padded_tail: bool = False

    @staticmethod
    def of_mask(mask, capacity=None):
        """The packing of a (batch, seqlen) mask of ones (real) and zeros, in any pattern.

        A mask on the CPU is counted there. One on a device is never waited for: the packed buffer
        gets ``capacity`` rows (default batch * seqlen), the ones past the last real token inert,
        and shapes depend on nothing in the mask, as CUDA graphs and torch.compile want it.

        Raises:
            TypeError, ValueError: the mask has another shape, or other values (CPU only), or more
                real tokens than ``capacity`` (on a device: an assertion there).
        """
        if mask.ndim != 2:
            raise ValueError(
                f"attention_mask must be (batch, seqlen), not {tuple(mask.shape)}: "
                "masks by pair of tokens are not supported"
            )
        if mask.is_complex():
            raise TypeError(f"attention_mask must hold ones and zeros, not {mask.dtype}")
        (batch, seqlen), flat = mask.shape, mask.reshape(-1).bool()
        host = mask.device.type == "cpu" and not torch.compiler.is_compiling()
        if host and mask.dtype != torch.bool and not torch.equal(mask, mask.bool().to(mask.dtype)):
            raise ValueError("attention_mask must hold ones and zeros alone")
        lengths = flat.view(batch, seqlen).sum(1, dtype=torch.int32)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))

        if host and capacity is None:
            max_seqlen = int(lengths.max()) if batch else 0
            index = flat.nonzero().squeeze(1)
            full = len(index) == len(flat)
            return Packing(cu_seqlens, max_seqlen, None if full else index, batch, seqlen)

        capacity = flat.numel() if capacity is None else capacity
        if host and int(cu_seqlens[-1]) > capacity:
            raise ValueError(f"capacity is {capacity}, but {int(cu_seqlens[-1])} tokens are real")
        if not host:
            torch._assert_async(cu_seqlens[-1] <= capacity, "capacity is below the real tokens")
        # Every real token writes its place into its packed row, every other into a row that is cut.
        row = torch.where(flat, flat.cumsum(0) - 1, capacity)
        index = torch.full((capacity + 1,), flat.numel(), dtype=torch.int64, device=mask.device)
        index.scatter_(0, row, torch.arange(flat.numel(), device=mask.device))
        return Packing(cu_seqlens, seqlen, index[:-1], batch, seqlen, padded_tail=True)

    @staticmethod
    def of_full(batch, seqlen, device):
        """The packing of a batch without padding."""
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen
        return Packing(cu_seqlens, seqlen, None, batch, seqlen)

    def to(self, device):
        """On another device, without waiting for it."""
        if self.cu_seqlens.device == device:
            return self
        return Packing(
            self.cu_seqlens.to(device, non_blocking=True), self.max_seqlen,
            None if self.index is None else self.index.to(device, non_blocking=True),
            self.batch, self.seqlen, self.padded_tail,
        )  # fmt: skip

    def pack(self, padded):
        """(batch, seqlen, ...) -> (total_tokens, ...). Rows of the tail repeat the last place."""
        flat = padded.reshape(self.batch * self.seqlen, *padded.shape[2:])
        if self.index is None:
            return flat
        index = self.index.clamp(max=flat.shape[0] - 1) if self.padded_tail else self.index
        return flat.index_select(0, index)

    def positions(self):
        """(total_tokens,): each token's column in the padded batch, Hugging Face's position."""
        if self.index is None:
            columns = torch.arange(self.seqlen, device=self.cu_seqlens.device)
            return columns.repeat(self.batch)
        return self.index % max(self.seqlen, 1)

    def unpack(self, packed):
        """(total_tokens, ...) -> (batch, seqlen, ...), zeros where there was padding."""
        shape = (self.batch, self.seqlen, *packed.shape[1:])
        if self.index is None:
            return packed.view(shape)
        # One row more than the batch: the tail's rows all land there.
        flat = packed.new_zeros(self.batch * self.seqlen + 1, *packed.shape[1:])
        return flat.index_copy(0, self.index, packed)[:-1].view(shape)
