"""A CUDA graph's inputs on their way into its memory: those on the CPU cross in one transfer."""

import torch

from bert_fast.models.packing import INTEGERS, is_on_host

MASK = 2  # among ids, token types, mask


class Inputs:
    """Ids, token types and mask of a graph: int64 (3, rows, columns) in its memory; ``pad`` fills
    the ids' surplus, zeros the others'.

    What comes from the CPU is written to pinned memory, of which there are two pieces: one while
    the other's transfer may still be under way. Only what differs from the call before is written.
    """

    def __init__(self, place, pad):
        self.place, self.pad = place, pad
        self.there, self.pieces, self.turn = _Rows(place, pad), [None, None], 0
        self.ends = [torch.cuda.Event() if place.is_cuda else None for _ in self.pieces]

    def fill(self, values, batch, seqlen):
        """Three (batch, seqlen) tensors on any device; None for no ids or types, and for a mask of
        ones. In the stream in which the graph runs; :meth:`end` is called behind it."""
        self.turn ^= 1
        on_host = [value is not None and is_on_host(value) for value in values]
        if any(on_host):
            piece = self._piece()
            for i, value in enumerate(values):
                piece.write(i, value if on_host[i] else None, batch, seqlen)
            self.place.copy_(piece.place, non_blocking=True)
            self.there.holds = piece.holds.copy()
        for i, value in enumerate(values):
            if not on_host[i]:
                self.there.write(i, value, batch, seqlen)

    def _piece(self):
        """The one whose turn it is, as soon as the turn before that read it has ended."""
        if (piece := self.pieces[self.turn]) is None:
            with torch.inference_mode(False):  # usable inside and outside inference mode
                here = torch.empty(
                    self.place.shape, dtype=self.place.dtype, pin_memory=self.place.is_cuda
                )
            piece = self.pieces[self.turn] = _Rows(here, self.pad)
        if (end := self.ends[self.turn]) is not None:
            end.synchronize()
        return piece

    def end(self, stream):
        """The end of this turn in the stream: an event, on a CPU None."""
        if (end := self.ends[self.turn]) is not None:
            end.record(stream)
        return end


class _Rows:
    """Three inputs, and what is known of each: the (batch, seqlen) that it was written with, and
    whether it then was a constant."""

    def __init__(self, place, pad):
        self.place, self.surplus = place, (pad, 0, 0)
        self.array = place.numpy() if is_on_host(place) else None
        self.rows, self.exact = list(place), tuple(place.shape[1:])
        self.holds = [None, None, None]

    def write(self, i, value, batch, seqlen):
        area, held = (batch, seqlen), self.holds[i]
        if value is None and held == (area, True):
            return
        self.holds[i] = None  # unless all of it is done
        row, is_exact = self.rows[i], area == self.exact
        if value is None or not (is_exact or (held is not None and held[0] == area)):
            row.fill_(self.surplus[i])
        if value is not None and self.array is not None and value.dtype in INTEGERS:
            self.array[i, :batch, :seqlen] = value.numpy()  # in a third of the time
        elif value is not None:
            (row if is_exact else row[:batch, :seqlen]).copy_(value, non_blocking=True)
        elif i == MASK:
            row[:batch, :seqlen].fill_(1)
        self.holds[i] = area, value is None
