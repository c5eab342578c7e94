"""How a mask is looked at: on the CPU by numpy, a small one on a device read whole, a larger one
counted there; and what is known of the sequences then."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import KINDS, masks
from test_staging import Calls

from bert_fast.models import packing as packing_file
from bert_fast.models.packing import Packing

LARGE = -1  # bytes: every mask is larger


def agree(found, wanted):
    assert found.cu_seqlens.dtype == wanted.cu_seqlens.dtype == torch.int32
    assert torch.equal(found.cu_seqlens.cpu(), wanted.cu_seqlens)
    assert (found.index is None) == (wanted.index is None)
    if found.index is not None:
        assert found.index.dtype == wanted.index.dtype == torch.int64
        assert torch.equal(found.index.cpu(), wanted.index)
    assert (found.max_seqlen, found.batch, found.seqlen, found.padded_tail) == (
        wanted.max_seqlen, wanted.batch, wanted.seqlen, False,
    )  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(mask=masks(), kind=st.sampled_from(KINDS))
def test_a_larger_mask_is_counted_where_it_is(mask, kind):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_file, "READ_WHOLE", LARGE)
        agree(packing_file._by_one_read(mask.to(kind)), Packing.of_mask(mask.to(kind)))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_other_values_are_refused_there(monkeypatch, kind):
    monkeypatch.setattr(packing_file, "READ_WHOLE", LARGE)
    for wrong in (2, 0.5, torch.nan):
        mask = torch.ones(3, 4).to(kind)
        mask[1, 2] = wrong if kind.is_floating_point else 2
        with pytest.raises(ValueError, match="ones and zeros alone"):
            packing_file._by_one_read(mask)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (1, 1)])
def test_empty_masks(monkeypatch, shape):
    mask = torch.ones(shape).long()
    wanted = Packing.of_mask(mask)
    assert wanted.cu_seqlens.tolist() == [n * shape[1] for n in range(shape[0] + 1)]
    for most in (LARGE, packing_file.READ_WHOLE):
        monkeypatch.setattr(packing_file, "READ_WHOLE", most)
        agree(packing_file._by_one_read(mask), wanted)


class Elsewhere(torch.Tensor):
    """Is asked for copies, and nothing else."""

    copies = 0

    def cpu(self):
        type(self).copies += 1
        return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name in ("__get__", "as_subclass", "numel"), name
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_small_mask_is_read_once_and_whole():
    """All that is asked of its device is one copy."""
    mask = (torch.rand(64, 128) < 0.6).long()
    mask[0, 0] = 1
    assert mask.nbytes == packing_file.READ_WHOLE
    _, offsets, count, *_ = packing_file.look_at(mask.as_subclass(Elsewhere))
    assert Elsewhere.copies == 1
    assert count == int(mask.sum()) == int(offsets[-1])


@settings(deadline=None, max_examples=100)
@given(mask=masks(), kind=st.sampled_from(KINDS), spare=st.integers(0, 7))
def test_a_buffer_of_fixed_size_is_the_one_of_a_trace(mask, kind, spare):
    """What a CUDA graph captures takes fewer launches than what compilers are shown."""
    mask, capacity = mask.to(kind), int(mask.sum()) + spare
    found = Packing.of_mask(mask, capacity)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        wanted = Packing.of_mask(mask, capacity)
    for a, b in ((found.cu_seqlens, wanted.cu_seqlens), (found.index, wanted.index)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b)
    assert len(found.index) == capacity
    assert found.padded_tail
    assert wanted.padded_tail


def test_launches_of_a_buffer_of_fixed_size():
    """Each a kernel on a GPU, or two: 13 in a trace."""
    mask = (torch.rand(4, 16) < 0.5).long()
    with Calls() as calls:
        packing_file._of_fixed_size(mask, 64, host=False)
    views = {"view", "select", "slice", "reshape"}
    assert [name for name in calls.names if name not in views] == [
        "_to_copy", "cumsum", "zeros", "copy_", "arange", "searchsorted", "le", "_assert_async",
    ]  # fmt: skip


def packings():
    full, none_empty, empty = torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 4)
    none_empty[1, 2:] = none_empty[2, 0] = 0
    empty[1] = 0
    for mask in (full, none_empty, empty, 0 * full):
        yield mask.bool(), Packing.of_mask(mask)
        yield mask.bool(), Packing.of_mask(mask, capacity=13)
    yield full.bool(), Packing.of_full(3, 4, torch.device("cpu"))


@pytest.mark.parametrize(("mask", "packing"), packings())
def test_first_tokens(mask, packing):
    """Rows, their gradients, and which are of no sequence."""
    packed = torch.randn(packing.pack(mask).shape[0], 5, dtype=torch.float64, requires_grad=True)
    found, empty = packing.first(packed)
    has_one = mask.any(1)
    wanted = packed[packing.cu_seqlens[:-1].long()[has_one]]
    assert found.shape == (3, 5)
    assert torch.equal(found[has_one], wanted)
    assert (empty is None) == (bool(has_one.all()) and not packing.padded_tail)
    if empty is not None:
        assert torch.equal(empty[:, 0], ~has_one)
    weight = torch.randn(3, 5, dtype=torch.float64) * has_one[:, None]
    if len(packed):
        grads = [
            torch.autograd.grad((value * by).sum(), packed)[0]
            for value, by in ((found, weight), (wanted, weight[has_one]))
        ]
        torch.testing.assert_close(*grads)


def test_first_tokens_of_packed_sequences():
    packed = torch.randn(6, 2)
    for lengths in ([6], [2, 4], [1, 0, 5]):
        offsets = torch.tensor([0, *lengths]).cumsum(0).int()
        found, empty = Packing(offsets, 6, None, 1, 6).first(packed)
        for n, length in enumerate(lengths):
            assert length == 0 or torch.equal(found[n], packed[offsets[n]])
            assert empty is None or bool(empty[n]) == (length == 0)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_looks_for_the_tokens_of_each_mask():
    """It keeps none of the mask's that it was made with."""

    def found(mask):
        packing = Packing.of_mask(mask)
        return packing.index, packing.cu_seqlens

    a, b = torch.eye(3).bool(), torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]]).bool()
    traced = torch.jit.trace(found, a)
    for mask in (a, b):
        for x, y in zip(traced(mask), found(mask), strict=True):
            assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("most", [LARGE, packing_file.READ_WHOLE])
def test_on_a_gpu(monkeypatch, most):
    monkeypatch.setattr(packing_file, "READ_WHOLE", most)
    for kind in KINDS:
        for share in (0.0, 0.5, 1.0):
            mask = (torch.rand(5, 9) < share).to(kind)
            found = Packing.of_mask(mask.cuda())
            assert found.cu_seqlens.is_cuda
            agree(found, Packing.of_mask(mask))
