"""Packing: any mask of ones and zeros, with and without a fixed capacity."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bert_fast
from bert_fast.models import packing as packing_file
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


KINDS = [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16]


@settings(deadline=None, max_examples=200)
@given(mask=masks(), kind=st.sampled_from(KINDS))
def test_one_read_finds_what_the_host_finds(mask, kind):
    """What is done with a mask on a device, here on one of the CPU."""
    wanted = Packing.of_mask(mask.to(kind))
    found = packing_file._by_one_read(mask.to(kind))
    assert found.cu_seqlens.dtype == torch.int32
    assert torch.equal(found.cu_seqlens, wanted.cu_seqlens)
    assert (found.index is None) == (wanted.index is None)
    if found.index is not None:
        assert found.index.dtype == torch.int64
        assert torch.equal(found.index, wanted.index)
    assert (found.max_seqlen, found.batch, found.seqlen, found.padded_tail) == (
        wanted.max_seqlen, wanted.batch, wanted.seqlen, False,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS[1:])
def test_one_read_refuses_what_the_host_refuses(kind):
    mask = torch.ones(3, 4).to(kind)
    mask[1, 2] = 2
    with pytest.raises(ValueError, match="ones and zeros alone"):
        packing_file._by_one_read(mask)
    for value in (-1.0, 0.5, torch.nan, torch.inf, -torch.inf):
        if mask.is_floating_point():
            mask[1, 2] = value
            with pytest.raises(ValueError, match="ones and zeros alone"):
                packing_file._by_one_read(mask)


@pytest.fixture
def elsewhere(monkeypatch):
    """Masks on the CPU are taken for a device's."""
    reads = []

    def look_at(mask, _function=packing_file.look_at):
        reads.append(mask)
        return _function(mask)

    monkeypatch.setattr(packing_file, "is_on_host", lambda tensor: False)
    monkeypatch.setattr(packing_file, "look_at", look_at)
    return reads


@pytest.mark.parametrize("when", ["captured", "capacity", "meta"])
def test_nothing_is_read_where_nothing_may_be_waited_for(elsewhere, monkeypatch, when):
    mask, capacity = torch.ones(2, 3), None
    if when == "captured":
        monkeypatch.setattr(packing_file, "is_captured", lambda device: True)
    elif when == "capacity":
        capacity = 6
    else:
        mask = mask.to("meta")
    assert Packing.of_mask(mask, capacity).padded_tail
    assert not elsewhere


SIZES = dict(
    vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=40, max_position_embeddings=20,
)  # fmt: skip
MASK = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 1, 0], [0] * 7, [1, 0, 0, 0, 0, 0, 0]])


def models():
    config = bert_fast.BertConfig(**SIZES)
    yield bert_fast.BertModel(config)
    for head in ("ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering"):
        yield getattr(bert_fast, f"Bert{head}")(config)


def accelerated():
    import transformers

    for head in ("Model", "ForTokenClassification"):
        kind = getattr(transformers, f"Bert{head}")
        yield bert_fast.accelerate(kind(transformers.BertConfig(**SIZES)))
    yield bert_fast.accelerate(transformers.MPNetModel(transformers.MPNetConfig(**SIZES)))


def rows_of_products(monkeypatch):
    """The rows of each product in the encoder's layers; there the biases' widths tell."""
    rows = []

    linear = F.linear

    def counted(x, weight, bias=None):
        if x.ndim == 2 and x.shape[1] in (24, 40) and weight.shape[0] in (24, 40, 72):
            rows.append(len(x))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", counted)
    return rows


@pytest.mark.parametrize("made", [models, accelerated])
def test_layers_see_the_real_tokens_alone(elsewhere, monkeypatch, made):
    """All that a model computes between embeddings and head, of a mask that is a device's; one
    read a call, and the results of a mask on the CPU."""
    real, ids = int(MASK.sum()), torch.randint(1, 50, MASK.shape)
    contiguous = (torch.arange(7) < torch.tensor([[3], [3], [0], [1]])).long()
    for model in made():
        mask = contiguous if "MPNet" in type(model).__name__ else MASK
        rows = rows_of_products(monkeypatch)
        found = model.eval()(ids, mask)
        monkeypatch.undo()
        wanted = model(ids, mask)
        monkeypatch.setattr(packing_file, "is_on_host", lambda tensor: False)
        products = 4 * 2 if made is models else 6 * 2
        assert rows.count(real) >= products
        assert set(rows) <= {real, len(MASK), MASK.numel()}
        for a, b in zip(found, wanted, strict=True):
            if torch.is_tensor(b):
                a, b = a[wanted_rows(b, mask)], b[wanted_rows(b, mask)]
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def wanted_rows(value, mask):
    return mask.bool() if value.shape[:2] == mask.shape else slice(None)


def test_layers_alone_see_the_real_tokens_alone(elsewhere, monkeypatch):
    layer, x = bert_fast.nn.EncoderLayer(24, 3, 40, 0.0), torch.randn(*MASK.shape, 24)
    rows = rows_of_products(monkeypatch)
    layer(x, src_key_padding_mask=MASK == 0)
    assert rows == [int(MASK.sum())] * 4
    assert len(elsewhere) == 1


def test_a_mask_crosses_as_one_small_transfer():
    """To a device go offsets and places, together, as int32: not the mask."""
    from torch.utils._python_dispatch import TorchDispatchMode

    crossed = []

    class Crossings(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if torch.is_tensor(out) and out.is_meta and not args[0].is_meta:
                crossed.append(out)
            return out

    packing = Packing.of_mask(MASK)
    with Crossings():
        moved = packing.to(torch.device("meta"))
    assert [(t.dtype, t.numel()) for t in crossed] == [(torch.int32, len(MASK) + 1 + MASK.sum())]
    assert (moved.cu_seqlens.dtype, moved.index.dtype) == (torch.int32, torch.int64)
    assert moved.cu_seqlens.shape == packing.cu_seqlens.shape
    assert moved.index.shape == packing.index.shape
    assert (moved.batch, moved.seqlen, moved.max_seqlen) == (4, 7, 3)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU; its logic ran without one"
)
class TestOnAGpu:
    @pytest.mark.parametrize("kind", KINDS)
    def test_one_read_and_the_same_packing(self, kind):
        mask = (torch.rand(9, 70) < 0.6).to(kind)
        wanted, given = Packing.of_mask(mask), mask.cuda()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchronizing CUDA operation") as waits:
                found = Packing.of_mask(given)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        assert len(waits) == 1
        for packing in (found, wanted.to(given.device)):
            assert packing.cu_seqlens.is_cuda
            assert torch.equal(packing.cu_seqlens.cpu(), wanted.cu_seqlens)
            assert torch.equal(packing.index.cpu(), wanted.index)
            assert packing.max_seqlen == wanted.max_seqlen

    def test_other_masks_are_refused(self):
        with pytest.raises(ValueError, match="ones and zeros alone"):
            Packing.of_mask(torch.tensor([[0.0, -1e4]], device="cuda"))

    @pytest.mark.parametrize("made", [models, accelerated])
    def test_layers_see_the_real_tokens_alone(self, monkeypatch, made):
        mask = (torch.arange(7) < torch.tensor([[3], [7], [0], [1]])).long()
        ids, real = torch.randint(1, 50, mask.shape).cuda(), int(mask.sum())
        for model in made():
            model.eval().cuda()
            rows = rows_of_products(monkeypatch)
            with torch.no_grad():
                found, wanted = (model(ids, m) for m in (mask.cuda(), mask))
            monkeypatch.undo()
            assert rows.count(real) >= 2 * 3 * 2
            assert set(rows) <= {real, len(mask), mask.numel()}
            for a, b in zip(found, wanted, strict=True):
                if torch.is_tensor(b):
                    torch.testing.assert_close(a, b)


def test_where_torch_counts_in_no_other_way(monkeypatch):
    """torch 2.6 has no nonzero_static on a GPU."""

    def absent(*args, **options):
        raise NotImplementedError("not for this device")

    flat = torch.rand(40) < 0.5
    wanted = packing_file.places(flat, int(flat.sum()))
    monkeypatch.setattr(torch, "nonzero_static", absent)
    assert torch.equal(packing_file.places(flat, int(flat.sum())), wanted)
    assert torch.equal(flat.nonzero().squeeze(1), wanted)
