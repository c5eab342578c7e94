"""Padding is dropped once, before the first layer, and put back once, after the last.

ByteTransformer's idea (Zhai et al. 2023): a batch of B padded rows of S tokens becomes the real
tokens alone, one sequence after another, with ``cu_seqlens`` (B + 1 offsets) to tell them apart.
"""

import contextlib
import contextvars
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bert_fast import ops

INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
# Bytes of a mask on a device up to which it is read whole: counting it there takes ten launches or
# more. Not measured on a GPU.
READ_WHOLE = 2**16

# The rows of every packed buffer that is made in a context: of what a CUDA graph is to capture.
_rows: contextvars.ContextVar[int | None] = contextvars.ContextVar("bert_fast_rows", default=None)


@contextlib.contextmanager
def fixed_rows(rows):
    """Packing.of_mask in this context has ``capacity`` ``rows``, whoever calls it."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def is_captured(device):
    """Whether a CUDA graph captures what is done on a device now, by its own current stream, or is
    about to (:func:`fixed_rows`)."""
    if _rows.get() is not None:
        return True
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
    padded_tail: whether there are such rows.
    none_empty: whether every sequence is known to have a token.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    index: Tensor | None
    batch: int
    seqlen: int
    padded_tail: bool = False
    none_empty: bool = False

    @staticmethod
    def of_mask(mask, capacity=None):
        """The packing of a (batch, seqlen) mask of ones (real) and zeros, in any pattern.

        A mask on the CPU is counted there, and so is a small one on a device, by one read; of a
        larger one count, longest and validity are read at once, a few bytes. That read is all that
        is waited for. Nothing is while a CUDA graph is
        captured or torch.compile traces, or with ``capacity``: the packed buffer then has
        ``capacity`` rows (default batch * seqlen), those past the last real token inert, and shapes
        depend on nothing in the mask.

        Raises:
            TypeError, ValueError: the mask has another shape, or other values (where nothing is
                waited for: on the CPU only), or more real tokens than ``capacity`` (on a device: an
                assertion there).
        """
        check_mask(mask)
        compiled = torch.compiler.is_compiling()
        if capacity is None and not compiled:
            capacity = _rows.get()
        if capacity is not None or mask.is_meta or compiled or is_captured(mask.device):
            return _of_fixed_size(mask, capacity, is_on_host(mask) and not compiled)
        return _counted(mask) if is_on_host(mask) else _by_one_read(mask)

    @staticmethod
    def of_full(batch, seqlen, device):
        """The packing of a batch without padding."""
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen
        return Packing(cu_seqlens, seqlen, None, batch, seqlen)

    def to(self, device):
        """On another device, without waiting for it: offsets and places of the real tokens cross
        together, as int32."""
        own = self.cu_seqlens
        if own.device == device:
            return self
        index, places = self.index, self.batch * self.seqlen
        if index is None or places >= 2**31 or not is_on_host(own):
            own = own.to(device, non_blocking=True)
            index = None if index is None else index.to(device, non_blocking=True)
        else:
            both = torch.cat([own, index.to(torch.int32)])
            both = (both.pin_memory() if device.type == "cuda" else both).to(
                device, non_blocking=True
            )
            own, index = both[: own.numel()], both[own.numel() :].long()
        return replace(self, cu_seqlens=own, index=index)

    def pack(self, padded):
        """(batch, seqlen, ...) -> (total_tokens, ...). Rows of the tail repeat the last place."""
        flat = padded.reshape(self.batch * self.seqlen, *padded.shape[2:])
        if self.index is None:
            return flat
        index = self.index.clamp(max=flat.shape[0] - 1) if self.padded_tail else self.index
        return flat.index_select(0, index)

    def first(self, packed):
        """(total_tokens, hidden) -> (batch, hidden), each sequence's first token; and (batch, 1),
        which sequences have none, whatever stands there: None where all have one."""
        begins = self.cu_seqlens[:-1]
        if self.index is None and begins.shape[0] == self.batch and self.seqlen:
            return packed.view(self.batch, self.seqlen, packed.shape[1])[:, 0], None
        if self.none_empty:
            return packed.index_select(0, begins), None
        empty = (self.cu_seqlens.diff() == 0)[:, None]
        if packed.shape[0] == 0:
            return packed.new_zeros(begins.shape[0], packed.shape[1]), empty
        return packed[begins.long().clamp(max=packed.shape[0] - 1)], empty

    def positions(self):
        """(total_tokens,): each token's column in the padded batch, Hugging Face's position."""
        if self.index is None:
            columns = torch.arange(self.seqlen, device=self.cu_seqlens.device)
            if self.batch == 1:
                return columns
            return columns.expand(self.batch, -1).reshape(-1)
        return self.index % max(self.seqlen, 1)

    def unpack(self, packed):
        """(total_tokens, ...) -> (batch, seqlen, ...), zeros where there was padding."""
        shape = (self.batch, self.seqlen, *packed.shape[1:])
        if self.index is None:
            return packed.view(shape)
        # With a tail one row more than the batch, where all the tail's rows land.
        rows = self.batch * self.seqlen + int(self.padded_tail)
        flat = packed.new_zeros(rows, *packed.shape[1:])
        flat.index_copy_(0, self.index, packed)
        return (flat[:-1] if self.padded_tail else flat).view(shape)

    def of_first(self, packed, function):
        """function((batch, ...), each sequence's first token); zeros for a sequence without any."""
        first, empty = self.first(packed)
        found = function(first)
        return found if empty is None else found.masked_fill(empty, 0)


def check_mask(mask):
    if mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be (batch, seqlen), not {tuple(mask.shape)}: "
            "masks by pair of tokens are not supported"
        )
    if mask.is_complex():
        raise TypeError(f"attention_mask must hold ones and zeros, not {mask.dtype}")


def is_on_host(tensor):
    """Whether looking at its values waits for nothing."""
    return tensor.device.type == "cpu"


def look_at(mask):
    """(what is not zero, offsets of the sequences, number of real tokens, longest, shortest) of a
    mask on a device: two tensors, bool and int32 (batch + 1,), and three integers; one read is
    waited for. Of a small mask that is all of it, and the tensors are on the CPU; of a larger one
    the shortest is not looked for, and 0.

    Raises:
        ValueError: the mask holds something else than ones and zeros.
    """
    if mask.nbytes <= READ_WHOLE:
        return _look_here(mask.cpu())
    real = mask if mask.dtype == torch.bool else mask != 0
    lengths = real.sum(1, dtype=torch.int32)
    offsets = lengths.new_zeros(len(lengths) + 1)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=offsets[1:])
    if mask.numel() == 0:
        return real, offsets, 0, 0, 0
    wrong = offsets[0] if real is mask else (mask != real).sum(dtype=torch.int32)
    count, longest, wrong = torch.stack([offsets[-1], lengths.max(), wrong]).tolist()  # one read
    if wrong:
        raise ValueError("attention_mask must hold ones and zeros alone")
    return real, offsets, count, longest, 0


def _look_here(mask):
    """The same of one on the CPU."""
    check_values(mask)
    real = mask.bool()
    if (array := as_array(real)) is None:
        lengths = real.sum(1, dtype=torch.int32)
        offsets = _offsets(lengths)
        return real, offsets, int(offsets[-1]), int(lengths.max()) if len(lengths) else 0, 0
    offsets = np.zeros(len(array) + 1, np.int32)
    lengths = np.add.reduce(array, axis=1, dtype=np.int32)
    np.add.accumulate(lengths, out=offsets[1:])
    shortest, longest = (lengths.min(), lengths.max()) if len(lengths) else (0, 0)
    return real, torch.from_numpy(offsets), int(offsets[-1]), int(longest), int(shortest)


def places(flat, count):
    """Where the ``count`` true elements are, (count,) int64: without a wait for the device, where
    torch can do that (on a GPU since 2.7)."""
    try:
        return torch.nonzero_static(flat, size=count).squeeze(1)
    except NotImplementedError:
        return flat.nonzero().squeeze(1)


def _by_one_read(mask):
    return _packing(mask, *look_at(mask)).to(mask.device)


def _counted(mask):
    if (found := ops.real_tokens(mask)) is not None:
        offsets, longest, none_empty, index = found
        return Packing(offsets, longest, index, *mask.shape, none_empty=none_empty)
    return _packing(mask, *_look_here(mask))


def _packing(mask, real, offsets, count, longest, shortest):
    (batch, seqlen), index = mask.shape, None
    if count < mask.numel():
        flat = real.reshape(-1)
        if (array := as_array(flat)) is not None:
            index = torch.from_numpy(array.nonzero()[0])
        elif flat.device.type == "cpu":
            index = flat.nonzero().squeeze(1)
        else:
            index = places(flat, count)
    return Packing(offsets, longest, index, batch, seqlen, none_empty=shortest > 0)


def _of_fixed_size(mask, capacity, host):
    if host:
        check_values(mask)
    (batch, seqlen), flat = mask.shape, mask.reshape(-1).bool()
    capacity = flat.numel() if capacity is None else capacity
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not traced and flat.numel():
        until = flat.cumsum(0)
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=mask.device)
        cu_seqlens[1:] = until.view(batch, seqlen)[:, -1]
        # A packed row's place is the first up to which so many tokens are real: fewer launches.
        rows = torch.arange(1, capacity + 1, device=mask.device)
        index = torch.searchsorted(until, rows)
    else:  # what every compiler and exporter knows
        cu_seqlens = _offsets(flat.view(batch, seqlen).sum(1, dtype=torch.int32))
        # Every real token writes its place into its packed row, every other into a row that is cut.
        row = torch.where(flat, flat.cumsum(0) - 1, capacity)
        index = torch.full((capacity + 1,), flat.numel(), dtype=torch.int64, device=mask.device)
        index = index.scatter_(0, row, torch.arange(flat.numel(), device=mask.device))[:-1]
    if host and int(cu_seqlens[-1]) > capacity:
        raise ValueError(f"capacity is {capacity}, but {int(cu_seqlens[-1])} tokens are real")
    if not host:
        torch._assert_async(cu_seqlens[-1] <= capacity, "capacity is below the real tokens")
    return Packing(cu_seqlens, seqlen, index, batch, seqlen, padded_tail=True)


def as_array(tensor):
    """The same memory for numpy, whose calls take a third of the time of torch's: of integers and
    booleans on the CPU; None of other tensors, and while something traces."""
    if (
        type(tensor) is Tensor
        and tensor.dtype in INTEGERS
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    ):
        return tensor.numpy()
    return None


def check_values(mask):
    """Of a mask whose values may be looked at."""
    _check_array(mask, as_array(mask))


def count(mask):
    """The number of real tokens of a mask, whose values may be looked at and are checked."""
    array = as_array(mask)
    _check_array(mask, array)
    return int(mask.count_nonzero() if array is None else np.count_nonzero(array))


def _check_array(mask, array):
    if mask.dtype == torch.bool:
        return
    if array is None:
        fits = torch.equal(mask, mask.bool().to(mask.dtype))
    else:
        fits = np.bitwise_or.reduce(array, axis=None) in (0, 1)
    if not fits:
        raise ValueError("attention_mask must hold ones and zeros alone")


def _offsets(lengths):
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
