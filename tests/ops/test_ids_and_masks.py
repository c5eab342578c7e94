"""Ids and masks read in one step: what torch's ops say of them, and refusals by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bert_fast import ops
from bert_fast.models.packing import Packing

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32,
    torch.float64, torch.float16, torch.bfloat16,
]  # fmt: skip


class Seen(TorchDispatchMode):
    """Somebody looks on: torch's own ops are asked."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@settings(deadline=None, max_examples=50)
@given(
    batch=st.integers(0, 5),
    seqlen=st.integers(0, 9),
    share=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
)
def test_a_mask_is_packed_as_torch_counts_it(batch, seqlen, share, dtype, transposed):
    mask = (torch.rand(batch, seqlen) < share).to(dtype)
    if transposed:  # the same numbers, not side by side
        mask = mask.t().contiguous().t()
    found = Packing.of_mask(mask)
    with Seen():
        wanted = Packing.of_mask(mask)
    assert found.cu_seqlens.dtype == wanted.cu_seqlens.dtype == torch.int32
    assert torch.equal(found.cu_seqlens, wanted.cu_seqlens)
    assert (found.index is None) == (wanted.index is None)
    if found.index is not None:
        assert found.index.dtype == wanted.index.dtype == torch.int64
        assert torch.equal(found.index, wanted.index)
    assert (found.max_seqlen, found.batch, found.seqlen) == (
        wanted.max_seqlen, wanted.batch, wanted.seqlen,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("wrong", [2, 0.5, -1, float("nan")])
def test_a_mask_of_other_values_is_refused(dtype, wrong):
    mask = torch.ones(3, 4, dtype=dtype)
    whole = wrong in (2, -1) and (wrong > 0 or dtype != torch.uint8)
    mask[1, 2] = wrong if whole or dtype.is_floating_point else 2
    with pytest.raises(ValueError, match="attention_mask must hold ones and zeros alone"):
        Packing.of_mask(mask)


def test_masks_in_memory_of_another_kind():
    """True by another byte than 1; a view by which numbers are negated; zeros without memory."""
    ones = torch.ones(2, 3)
    for mask in (torch.full((2, 3), 2, dtype=torch.uint8).view(torch.bool),
                 torch._neg_view(-ones), torch._efficientzerotensor((2, 3))):  # fmt: skip
        lengths = mask.clone().bool().sum(1).tolist()
        found = Packing.of_mask(mask)
        assert found.cu_seqlens.diff().tolist() == lengths


@settings(deadline=None, max_examples=30)
@given(
    ids=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    step=st.integers(1, 3),
)
def test_the_range_of_ids(ids, dtype, step):
    ids = torch.tensor(ids, dtype=dtype)[::step]
    low, high = ops.range_of(ids)
    assert (low, high) == (ids.min().item(), ids.max().item())
    with Seen():
        assert ops.range_of(ids) == (low, high)


def test_the_range_of_wide_ids():
    far = 2**40
    assert ops.range_of(torch.tensor([[3, far], [-far, 0]])) == (-far, far)


def test_first_tokens():
    """Of full batches a view, of others by their offsets; zeros for those without any."""
    hidden = torch.randn(3, 4, 5)
    full = Packing.of_mask(torch.ones(3, 4))
    assert torch.equal(full.of_first(full.pack(hidden), torch.exp), hidden[:, 0].exp())
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]])
    some = Packing.of_mask(mask)
    wanted = torch.stack([hidden[0, 1].exp(), torch.zeros(5), hidden[2, 0].exp()])
    assert torch.equal(some.of_first(some.pack(hidden), torch.exp), wanted)
    none = Packing.of_mask(torch.zeros(3, 4))
    assert torch.equal(none.of_first(none.pack(hidden), torch.exp), torch.zeros(3, 5))
    offsets = torch.tensor([0, 3, 3, 12], dtype=torch.int32)
    packed = Packing(offsets, 9, None, 1, 12)
    flat = hidden.view(12, 5)
    wanted = torch.stack([flat[0].exp(), torch.zeros(5), flat[3].exp()])
    assert torch.equal(packed.of_first(flat, torch.exp), wanted)


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5), width=st.integers(1, 40))
def test_means_of_sequences(lengths, width):
    """The bits that torch's index_add_ gives."""
    x = torch.randn(sum(lengths), width)
    cu_seqlens = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    sequence = torch.repeat_interleave(torch.tensor(lengths))
    total = torch.zeros(len(lengths), width).index_add_(0, sequence, x)
    wanted = total / torch.tensor(lengths).clamp(min=1)[:, None].float()
    with torch.no_grad():
        assert torch.equal(ops.means(x, cu_seqlens), wanted)


@torch.no_grad()
def test_means_left_to_torch():
    """Offsets of other rows, other types, somebody who looks on."""
    x, offsets = torch.randn(6, 4), torch.tensor([0, 2, 6], dtype=torch.int32)
    assert ops.means(x, offsets) is not None
    for wrong in ([0, 2, 7], [0, 2, 5], [1, 2, 6], [0, 8, 6]):
        assert ops.means(x, torch.tensor(wrong, dtype=torch.int32)) is None
    for other in (x.double(), x.t().contiguous().t(), x[:, ::2], x[0]):
        assert ops.means(other, offsets) is None
    assert ops.means(x, offsets.long()) is None
    with Seen():
        assert ops.means(x, offsets) is None
    with torch.enable_grad():
        assert ops.means(x.requires_grad_(), offsets) is None
