"""torch.library: opcheck, gradcheck of the definition, torch.compile, autocast, checkpointing."""

import concurrent.futures
import copy
import importlib

import pytest
import torch
import transformers
from conftest import assert_within, cu_seqlens
from torch.library import opcheck

import bert_fast
from bert_fast import ops
from bert_fast.ops import reference

CU = cu_seqlens([5, 0, 9])
SEED = torch.tensor([11])
OPTIONS = (CU, CU, 9, 9, torch.randn(3, 2, 8).requires_grad_(), 0.3, True, 0.2, SEED, "cpu")


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


OP_CALLS = {
    "attention": lambda: (leaf(14, 2, 8), leaf(14, 2, 8), leaf(14, 2, 8), *OPTIONS),
    "attention_qkv": lambda: (leaf(14, 3, 2, 8), *OPTIONS),
    "attention_qkv-table": lambda: (leaf(14, 3, 2, 8), *OPTIONS, leaf(2, 9, 9)),
    "attention_qkv-rounded": lambda: (
        torch.randn(14, 3, 2, 8), *OPTIONS[:4], None, 0.3, True, 0.0, None, "cpu", None, "bfloat16",
    ),
    "layer_norm": lambda: (
        leaf(6, 20), leaf(6, 20), leaf(20), leaf(20), leaf(20), 1e-5, 0.1, SEED, "cpu",
    ),
    "layer_norm-plain": lambda: (
        leaf(6, 20), None, leaf(20), leaf(20), None, 1e-5, 0.0, None, "cpu",
    ),
    "gelu": lambda: (leaf(6, 20), leaf(20), "none", "cpu"),
    "linear_gelu": lambda: (leaf(3, 2, 8), leaf(16, 8), leaf(16), "none", True, "triton"),
    "linear_gelu-plain": lambda: (torch.randn(3, 8), torch.randn(16, 8), None, "tanh", False,
                                  "triton"),
    "embedding_layer_norm": lambda: (
        *[torch.arange(4)] * 2, None, *(leaf(5, 8) for _ in range(3)), leaf(8), leaf(8), 1e-5, 0,
        torch.float32, True, "triton",
    ),
    "embedding_layer_norm-cpu": lambda: (
        *[torch.arange(4)] * 3, *(leaf(5, 8) for _ in range(3)), leaf(8), leaf(8), 1e-5, 0,
        torch.float32, True, "cpu",
    ),
    "gelu-plain": lambda: (leaf(6, 20), None, "tanh", "cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", OP_CALLS)
def test_opcheck(name, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    op = getattr(torch.ops.bert_fast, name.partition("-")[0])
    opcheck(op.default, OP_CALLS[name]())


@pytest.mark.parametrize("name", ["attention_backward", "attention_qkv_backward"])
def test_opcheck_backward(name, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    options = (*OPTIONS[:4], OPTIONS[4].detach(), *OPTIONS[5:])
    qkv, dout = torch.randn(14, 3, 2, 8), torch.randn(14, 2, 8)
    out, lse = torch.ops.bert_fast.attention_qkv(qkv, *options)
    inputs = (qkv,) if "qkv" in name else tuple(t.contiguous() for t in qkv.unbind(1))
    opcheck(getattr(torch.ops.bert_fast, name).default, (dout, *inputs, out, lse, *options))


def test_second_derivatives_are_refused_not_forgotten():
    x, weight = leaf(4, 6), leaf(6)
    qkv, cu = leaf(4, 3, 1, 8), cu_seqlens([4])
    for out, leaves in (
        (bert_fast.gelu(x), x),
        (bert_fast.layer_norm(x, weight, weight), x),
        (bert_fast.attention_qkv(qkv, cu), qkv),
        (bert_fast.attention(*qkv.unbind(1), cu), qkv),
    ):
        (first,) = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            first.sum().backward()
    (first,) = torch.autograd.grad(bert_fast.gelu(x, backend="eager").sum(), x, create_graph=True)
    first.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_of_the_definition(dropout_p, causal):
    """The reference's gradients, by finite differences in float64."""
    lengths_q, lengths_k = cu_seqlens([3, 0, 4]), cu_seqlens([2, 3, 0])
    q, k, v = (leaf(n, 2, 3, dtype=torch.float64) for n in (7, 5, 5))
    bias = leaf(3, 2, 3, dtype=torch.float64)

    def attention(q, k, v, bias):
        return ops.attention(
            q, k, v, lengths_q, lengths_k, bias=bias, causal=causal, dropout_p=dropout_p, seed=3
        )

    torch.autograd.gradcheck(attention, (q, k, v, bias))

    def layer_norm(x, weight, bias, residual, linear_bias):
        return ops.layer_norm(
            x, weight, bias, residual=residual, linear_bias=linear_bias, dropout_p=dropout_p, seed=3
        )

    vectors = [leaf(5, dtype=torch.float64) for _ in range(3)]
    x, residual = (leaf(4, 5, dtype=torch.float64) for _ in range(2))
    torch.autograd.gradcheck(layer_norm, (x, *vectors[:2], residual, vectors[2]))
    torch.autograd.gradcheck(ops.gelu, (x, vectors[0]))


def test_every_element_has_bits_of_its_own():
    """Each half of each word is some key's and some column's, and no two's."""
    keys = reference.column_of_key(torch.arange(4096))
    assert keys.sort().values.equal(torch.arange(4096))
    words = reference.philox(5, [torch.tensor([c]) for c in (0, 7, 1, 2)])
    halves = [int(word) >> shift & 0xFFFF for word in words for shift in (0, 16)]
    for place, bits in enumerate(halves):
        for p, kept in ((bits / 65536, True), ((bits + 1) / 65536, False)):
            factor = reference.dropout_factors(5, p, torch.tensor(place), 7, 1, 2)
            assert (factor > 0).item() == kept


PI = 0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


@pytest.mark.parametrize(
    ("rounds", "seed", "counter", "wanted"),
    [
        (7, 0, (0, 0, 0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (7, *PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
        (10, 0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, *PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_is_philox(rounds, seed, counter, wanted):
    """The known answers published with Random123 (kat_vectors, philox4x32)."""
    words = reference.philox(seed, [torch.tensor([c]) for c in counter], rounds)
    assert tuple(int(w) for w in words) == wanted


def test_autocast():
    qkv, bias = leaf(14, 3, 2, 8), leaf(3, 2, 8)
    x, weight = leaf(6, 20), leaf(20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attended = bert_fast.attention_qkv(qkv, CU, bias=bias)
        normed = bert_fast.layer_norm(x, weight, weight, residual=x)
        direct = torch.ops.bert_fast.attention_qkv(qkv, *OPTIONS)[0]
        geluded = bert_fast.gelu(x.bfloat16(), weight)
        mixed = bert_fast.layer_norm(x.bfloat16(), weight, weight, residual=x)
    for out in (attended, normed, direct, geluded, mixed):
        assert out.dtype == torch.bfloat16
    (attended.sum() + normed.sum() + geluded.sum()).backward()
    assert qkv.grad.dtype == bias.grad.dtype == weight.grad.dtype == torch.float32
    low = bert_fast.attention_qkv(qkv.detach().bfloat16(), CU, bias=bias.detach())
    assert torch.equal(attended.detach(), low)


def tiny(**changes):
    sizes = {
        "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 40, "max_position_embeddings": 16,
    }  # fmt: skip
    return bert_fast.BertModel(bert_fast.BertConfig(**(sizes | changes)))


@pytest.mark.parametrize("compiler", ["aot_eager", "eager"])
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_compile_fullgraph(compiler, name, monkeypatch):
    """Model and gradients through torch.compile in one graph, capacity mode and full batches."""
    if bert_fast.backends.why_not(name, "gelu", "cpu", torch.float32, True):
        pytest.skip(f"{name} does not run on CPU tensors here; the other parameter does")
    monkeypatch.setenv("BERT_FAST_BACKEND", name)
    model = tiny().eval()
    ids = torch.randint(1, 50, (4, 9))
    mask = (torch.arange(9) < torch.tensor([9, 4, 1, 0])[:, None]).long()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    probe = torch.randn(4, 9, 24)  # not a sum of squares: a layer-norm's hardly changes
    for options in ({}, {"attention_mask": mask, "capacity": 20}):
        plain = model(ids, **options)
        traced = compiled(ids, **options)
        torch.testing.assert_close(traced.last_hidden_state, plain.last_hidden_state)
        torch.testing.assert_close(traced.pooler_output, plain.pooler_output)
        exact = copy.deepcopy(model).double()
        with bert_fast.use_backend("eager"):
            truth = exact(ids, **options)

        def results(model, out):
            loss, parameters = (out[0] * probe.to(out[0].dtype)).sum(), list(model.parameters())
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            absent = zip(found, parameters, strict=True)  # a gradient that is zero may be absent
            return [out[0].detach(), *(torch.zeros_like(p) if g is None else g for g, p in absent)]

        assert_within(results(model, traced), results(model, plain), results(exact, truth))


@pytest.mark.parametrize("masked", [False, True])
def test_export(masked, tmp_path):
    """One program for every batch and length, saved and loaded."""
    model, batch, seqlen = (
        tiny().eval(),
        torch.export.Dim("batch"),
        torch.export.Dim("seqlen", max=16),
    )
    dims = {0: batch, 1: seqlen}

    def inputs(lengths):
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(1, 50, mask.shape)
        return {"input_ids": ids} | ({"attention_mask": mask} if masked else {})

    example = inputs([9, 4, 1])
    shapes = dict.fromkeys(example, dims)
    program = torch.export.export(model, (), example, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for lengths in ([9, 4, 1], [5, 5], [16, 2, 3, 11, 7]):
        other = inputs(lengths)
        with torch.no_grad():
            torch.testing.assert_close(again(**other)[:2], model(**other)[:2])


def test_one_compilation_for_all_lengths():
    """A batch and a length that change are no constants to compile for, from the second on."""
    model = tiny().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for batch, seqlen in ((4, 9), (5, 8)):
            compiled(torch.randint(1, 50, (batch, seqlen)))
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch, seqlen in ((3, 5), (7, 16), (2, 11)):
                ids = torch.randint(1, 50, (batch, seqlen))
                torch.testing.assert_close(compiled(ids)[0], model(ids)[0])


def test_data_parallel_replicas(monkeypatch):
    """DataParallel's copies, whose parameters are plain tensors; devices alone are left out."""
    module = importlib.import_module("torch.nn.parallel.replicate")

    def broadcast(tensors, devices, detach=False):
        return [[t.detach() if detach else t.view_as(t) for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    model = tiny().eval()
    theirs = transformers.BertModel(transformers.BertConfig(**model.config.to_dict())).eval()
    ids, probe = torch.randint(1, 50, (4, 9)), torch.randn(4, 9, 24)
    for whole in (model, bert_fast.accelerate(theirs)):
        wanted = (whole(ids)[0] * probe).sum()
        parameters = [p for n, p in whole.named_parameters() if "pooler" not in n]
        truth = torch.autograd.grad(wanted, parameters)
        first, second = module.replicate(whole, [0, 1])
        assert isinstance(second, type(whole))
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            outs = list(pool.map(lambda m, i: m(i)[0], (first, second), ids.chunk(2)))
        total = (torch.cat(outs) * probe).sum()
        torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-4)
        for a, b in zip(torch.autograd.grad(total, parameters), truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_many_threads_share_a_model():
    """As DataParallel's do, and a server's: each has its own memory."""
    model = tiny().eval()
    inputs = [torch.randint(1, 50, (4, n)) for n in (16, 3, 9, 16, 7, 12)]
    with torch.inference_mode():
        wanted = [model(ids)[0].clone() for ids in inputs]

    def run(i):
        with torch.inference_mode():
            return all(torch.equal(model(inputs[i])[0], wanted[i]) for _ in range(30))

    with concurrent.futures.ThreadPoolExecutor(len(inputs)) as pool:
        assert all(pool.map(run, range(len(inputs))))


def test_activation_checkpointing_redraws_the_same_dropout():
    layer = tiny(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train().layers[0]
    from bert_fast.models.packing import Packing
    from bert_fast.models.workspace import NoWorkspace

    packing, x = Packing.of_full(2, 6, torch.device("cpu")), leaf(12, 24)
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(5)
        if checkpoint:
            out = torch.utils.checkpoint.checkpoint(
                layer, x, packing, NoWorkspace(), use_reentrant=False
            )
        else:
            out = layer(x, packing, NoWorkspace())
        gradients.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert torch.equal(*gradients)
