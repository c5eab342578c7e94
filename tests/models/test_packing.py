"""Packing: any mask of ones and zeros, with and without a fixed capacity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast.models.packing import Packing


@st.composite
def masks(draw):
    batch, seqlen = draw(st.integers(0, 5)), draw(st.integers(1, 5))
    bits = st.lists(st.booleans(), min_size=batch * seqlen, max_size=batch * seqlen)
    return torch.tensor(draw(bits), dtype=torch.bool).view(batch, seqlen)


@settings(deadline=None, max_examples=200)
@given(mask=masks(), spare=st.integers(0, 7), fixed=st.booleans())
def test_pack_and_unpack(mask, spare, fixed):
    real = int(mask.sum())
    packing = Packing.of_mask(mask.long(), real + spare if fixed else None)
    batch = torch.randn(*mask.shape, 3)
    packed = packing.pack(batch) if real else batch.new_zeros(real + spare * fixed, 3)
    assert torch.equal(packed[:real], batch[mask])
    assert packed.shape[0] == real + (spare if fixed else 0)
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert packing.max_seqlen >= max(mask.sum(1).tolist(), default=0)
    columns = torch.arange(mask.shape[1]).expand_as(mask)[mask]
    assert torch.equal(packing.positions()[:real], columns)
    packed[real:] = torch.nan  # the tail must not come back
    assert torch.equal(packing.unpack(packed), batch * mask[..., None])


def test_full_batch_is_a_reshape():
    packing, batch = Packing.of_full(2, 5, torch.device("cpu")), torch.randn(2, 5, 3)
    assert packing.pack(batch).data_ptr() == batch.data_ptr()
    assert torch.equal(packing.unpack(packing.pack(batch)), batch)
    assert packing.positions().tolist() == [*range(5), *range(5)]


def test_unpack_has_a_gradient():
    packing = Packing.of_mask(torch.tensor([[1, 0, 1], [0, 0, 1]]))
    packed = torch.randn(3, 2, requires_grad=True)
    weight = torch.randn(2, 3, 2)
    (packing.unpack(packed) * weight).sum().backward()
    assert torch.equal(packed.grad, packing.pack(weight))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 2]]), "ones and zeros alone"),
        (torch.tensor([[0.5, 1.0]]), "ones and zeros alone"),
        (torch.tensor([[0.0, -10000.0]]), "ones and zeros alone"),
        (torch.tensor([[0.0, torch.nan]]), "ones and zeros alone"),
        (torch.ones(2, 1, 4, 4), "must be .batch, seqlen."),
    ],
)
def test_other_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        Packing.of_mask(mask)


def test_capacity_too_small():
    with pytest.raises(ValueError, match="capacity is 2, but 3 tokens are real"):
        Packing.of_mask(torch.ones(1, 3).long(), capacity=2)


def test_device_path_looks_at_no_value():
    """On the meta device every look at a value raises: what a GPU would have to wait for."""
    packing = Packing.of_mask(torch.ones(4, 8, dtype=torch.int64, device="meta"), capacity=20)
    packed = packing.pack(torch.empty(4, 8, 3, device="meta"))
    assert packed.shape == (20, 3)
    assert packing.positions().shape == (20,)
    assert packing.unpack(packed).shape == (4, 8, 3)
