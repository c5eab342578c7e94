"""Embeddings and their layer-norm as one op: every backend against the float64 reference."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, assert_within, same_bits_at_any_thread_count
from torch._subclasses.fake_tensor import FakeTensorMode

import bert_fast
from bert_fast import ops
from bert_fast.ops import embedding

VOCABULARY, POSITIONS, TYPES = 30, 12, 2


def ids(tokens, dtype=torch.int64):
    sizes = (VOCABULARY, POSITIONS, TYPES)
    return [torch.randint(size, (tokens,), dtype=dtype) for size in sizes]


def weights(width, dtype):
    tables = [torch.randn(n, width).double() for n in (VOCABULARY, POSITIONS, TYPES)]
    return [t.to(dtype).double() for t in (*tables, torch.randn(width), torch.randn(width))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (70, 24), (13, 77), (5, 1030), (0, 8)])
@pytest.mark.parametrize(("with_types", "id_type"), [(True, torch.int32), (False, torch.int64)])
def test_forward_and_backward(backend, gradients, dtype, tokens, width, with_types, id_type):
    input_ids, position_ids, types = ids(tokens, id_type)
    types = types if with_types else None
    dout = torch.randn(tokens, width).to(dtype).double()
    inputs = weights(width, dtype)

    def run(*inputs, backend=None):
        return ops.embedding_layer_norm(
            input_ids, position_ids, types, *inputs, padding_idx=0, backend=backend
        )

    def eager(*inputs):
        return run(*inputs, backend="eager")

    assert_within(
        gradients(run, inputs, dout, dtype),
        gradients(eager, inputs, dout, dtype),
        gradients(eager, inputs, dout, torch.float64),
        name="out, dword, dposition, dtype, dweight, dbias",
    )


def test_autocast_and_bitwise_repeatable_gradients(backend):
    tokens = ids(50)
    tables = [t.float().requires_grad_() for t in weights(24, torch.float32)]
    device = tables[0].device.type

    def run():
        with torch.autocast(device, dtype=torch.bfloat16):
            out = ops.embedding_layer_norm(*tokens, *tables, padding_idx=3)
        assert out.dtype == torch.bfloat16
        return torch.autograd.grad(out.float().square().sum(), tables)

    first = run()
    assert first[0][3].eq(0).all()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    assert all(g.dtype == torch.float32 for g in first)


def test_an_id_outside_of_its_table_is_an_error(backend):
    """As torch's embedding has it; on a GPU both stop the kernel, and the process with it."""
    tokens, tables = ids(9), [t.float() for t in weights(16, torch.float32)]
    if tables[0].is_cuda:
        pytest.skip("on a GPU a device-side assertion ends every CUDA call of the process")
    for wrong in (-1, VOCABULARY):
        tokens[0][4] = wrong
        with pytest.raises(IndexError, match="out of range"):
            ops.embedding_layer_norm(*tokens, *tables)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("compiled", [False, True])
def test_ids_outside_of_any_table_whoever_calls(which, compiled):
    """A traced graph sees no values: there the kernel refuses, and reads nothing out of bounds."""
    tokens, tables = ids(9), [t.float() for t in weights(16, torch.float32)]
    run = ops.embedding_layer_norm
    if compiled:
        run = torch.compile(run, fullgraph=True, backend="eager")
    run(*tokens, *tables)
    name = ("input_ids", "position_ids", "token_type_ids")[which]
    for wrong in (-1, len(tables[which]), 2**40):
        tokens[which][4] = wrong
        with pytest.raises(IndexError, match=f"{name} out of range"):
            run(*tokens, *tables)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_at_any_thread_count_and_as_hugging_face_adds(backend, dtype):
    """(word + type) + position, then torch's layer-norm; kernels' rows do not meet."""
    if backend not in ("cpu", "eager"):
        pytest.skip("another backend has no threads")
    tokens, tables = ids(700), [t.to(dtype) for t in weights(64, dtype)]
    same_bits_at_any_thread_count(lambda: (ops.embedding_layer_norm(*tokens, *tables),))

    def by_torch(*tables):
        word, position, types = (t[i] for t, i in zip(tables[:3], tokens, strict=True))
        return F.layer_norm(word + types + position, (64,), *tables[3:], 1e-12)

    assert_within(
        [ops.embedding_layer_norm(*tokens, *tables)],
        [by_torch(*tables)],
        [by_torch(*(t.double() for t in tables))],
    )


def test_kinds_of_ids_may_differ():
    tokens, tables = ids(40), [t.float() for t in weights(24, torch.float32)]
    wanted = ops.embedding_layer_norm(*tokens, *tables)
    for kinds in ((torch.int32, torch.int64, torch.int32), (torch.int64, torch.int32, torch.int64)):
        given = [t.to(kind) for t, kind in zip(tokens, kinds, strict=True)]
        assert torch.equal(ops.embedding_layer_norm(*given, *tables), wanted)
    apart = [torch.stack([t, t], dim=1)[:, 0] for t in tokens]  # every other number
    assert torch.equal(ops.embedding_layer_norm(*apart, *tables), wanted)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input_ids": torch.rand(3)}, "input_ids must be an int64 or int32 tensor"),
        ({"position_ids": torch.arange(4)}, "position_ids must be packed"),
        ({"position": torch.rand(4, 5)}, r"position must be \(number, 8\), not \(4, 5\)"),
        ({"token_type": torch.rand(2, 8).half()}, "token_type is torch.float16"),
        ({"weight": torch.rand(7)}, r"weight must have shape \(8,\), not \(7,\)"),
    ],
)
def test_bad_input(change, said):
    good = {
        "input_ids": torch.arange(3), "position_ids": torch.arange(3), "token_type_ids": None,
        "word": torch.rand(5, 8), "position": torch.rand(4, 8), "token_type": torch.rand(2, 8),
        "weight": torch.rand(8), "bias": torch.rand(8),
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=said):
        bert_fast.embedding_layer_norm(**(good | change))


def test_ids_that_torch_sorts_on_a_gpu():
    """In half as many launches; elsewhere nothing is sorted, and nothing copied."""
    with FakeTensorMode():
        for device, tokens, dtype in (
            ("cuda", 3073, torch.int32), ("cuda", 3072, torch.int64), ("cpu", 3073, torch.int64)
        ):  # fmt: skip
            ids = torch.empty(tokens, dtype=torch.int64, device=device)
            assert embedding._to_sort(ids).dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: others sort no ids")
def test_ids_that_are_sorted():
    ids, dout = torch.randint(90, (5000,), device="cuda"), torch.randn(5000, 32, device="cuda")
    given = 90, 3, False
    wide, narrow = (
        torch.ops.aten.embedding_dense_backward(dout, i, *given) for i in (ids, ids.int())
    )
    assert torch.equal(wide, narrow)
