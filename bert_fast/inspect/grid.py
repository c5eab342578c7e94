"""The whole grid: what ragged ends and the last wave of CTAs lose, and so a launch's and a layer's
time at best, for sequences of any lengths."""

import heapq
from dataclasses import dataclass

from bert_fast.inspect.chips import CHIPS


@dataclass(frozen=True)
class Grid:
    """How much of a launch is work."""

    turns: int  # of the main loop, of all CTAs
    longest: int  # the same, of the multiprocessor that ends last
    sms: int
    ctas: int
    useful: float  # the share of what the turns compute that belongs to a sequence

    @property
    def ragged(self):
        """The share of the turns' work that ragged ends lose."""
        return 1 - self.useful

    @property
    def idle(self):
        """The share of the multiprocessors' time that passes while others end."""
        return 1 - self.turns / (self.longest * self.sms)

    def microseconds(self, cycles, ghz):
        """At best, where a turn takes a multiprocessor so many cycles."""
        return self.longest * cycles / ghz / 1e3


def spread(costs, chip):
    """(all turns, those of the multiprocessor that ends last): each CTA in turn goes to the one
    that is free first. CTAs that share a multiprocessor share its pipes, so the order among them
    does not matter."""
    sms = [0] * CHIPS[chip].sms
    for cost in costs:
        heapq.heappush(sms, heapq.heappop(sms) + cost)
    return sum(sms), max(sms)


def attention(chip, lengths, heads, rows, cols, by_keys=False, causal=False):
    """:class:`Grid` of an attention kernel whose CTAs own ``rows`` queries (or keys: ``by_keys``)
    and take ``cols`` of the other side a turn."""

    def turns(length, first):
        start = first // cols if causal and by_keys else 0  # what sees no key of the tile
        end = min(length, first + rows) if causal and not by_keys else length
        return -(-end // cols) - start

    costs = [turns(n, first) for n in lengths for first in range(0, n, rows)] * heads
    every, longest = spread(costs, chip)
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths) * heads
    useful = pairs / max(every * rows * cols, 1)
    return Grid(every, max(longest, 1), CHIPS[chip].sms, len(costs), useful)


def of_rows(chip, elements, tile, ctas):
    """:class:`Grid` of a kernel that goes through rows: ``ctas`` share ``elements``, ``tile`` of
    them a turn."""
    each = -(-elements // (tile * ctas))
    every, longest = spread([each] * ctas, chip)
    return Grid(every, longest, CHIPS[chip].sms, ctas, elements / (every * tile))


def of_work(work, kernel, tile, sizes, chip, ctas):
    """:class:`Grid` of a Triton launch; None where its CTAs are not modelled: the products' and the
    position bias's gradient."""
    if tile.products == 0:
        return of_rows(chip, work.rows * work.width, tile.elements, ctas)
    if kernel not in ("attention.forward", "attention.backward_q", "attention.backward_kv",
                      "attention_short.backward"):  # fmt: skip
        return None
    rows, cols = sizes["BLOCK_M"], sizes["BLOCK_N"]
    by_keys = kernel == "attention.backward_kv"
    if by_keys:
        rows, cols = cols, rows
    return attention(chip, work.lengths, work.num_heads, rows, cols, by_keys, work.causal)
