"""bert_fast.nn beside torch.nn: weights loaded, results, gradients."""

import pytest
import torch
from conftest import assert_within, cu_seqlens

import bert_fast

SIZES = (36, 3, 70)
LENGTHS = [9, 4, 1]


def pair(**options):
    theirs = torch.nn.TransformerEncoderLayer(
        *SIZES, activation="gelu", batch_first=True, **options
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    ours = bert_fast.nn.EncoderLayer(*SIZES, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def padding():
    return torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]


@pytest.mark.parametrize("causal", [False, True])
def test_encoder_layer(causal):
    theirs, ours = pair(dropout=0.0)
    x, pad = torch.randn(3, 9, 36, requires_grad=True), padding()
    above = torch.ones(9, 9).triu(1).bool() if causal else None
    weights = torch.randn(3, 9, 36).masked_fill(pad[..., None], 0).double()

    def run(layer, x, mask):
        layer.zero_grad()
        out = layer(x, src_mask=mask, src_key_padding_mask=pad, is_causal=causal)
        out = out.masked_fill(pad[..., None], 0)
        inputs = [x, *layer.parameters()]
        return [out.detach(), *torch.autograd.grad((out * weights.to(out.dtype)).sum(), inputs)]

    found = run(ours, x, above)
    names = [n for n, _ in ours.named_parameters()]
    assert names == [n for n, _ in theirs.named_parameters()]
    torchs = run(theirs, x, above)
    truth = run(theirs.double(), x.detach().double().requires_grad_(), above)
    assert_within(found, torchs, truth)


def test_packed_is_padded():
    _, ours = pair()
    ours.eval()
    x, real = torch.randn(3, 9, 36), ~padding()
    padded = ours(x, src_key_padding_mask=~real)
    assert torch.equal(ours(x[real], cu_seqlens=cu_seqlens(LENGTHS)), padded[real])
    assert padded[~real].eq(0).all()


def test_in_torchs_encoder():
    theirs, ours = pair()
    x, pad = torch.randn(3, 9, 36), padding()
    results = []
    for layer in (theirs, ours):
        stack = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        results.append(stack(x, src_key_padding_mask=pad)[~pad])
    assert (results[0] - results[1]).abs().max() < 2e-5


def test_attention():
    theirs = torch.nn.MultiheadAttention(36, 3, batch_first=True)
    ours = bert_fast.nn.Attention(36, 3)
    ours.load_state_dict(theirs.state_dict())
    x, pad = torch.randn(3, 9, 36), padding()
    wanted, _ = theirs(x, x, x, key_padding_mask=pad)
    assert ((ours(x, pad) - wanted)[~pad]).abs().max() < 2e-6


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_layer_norm_and_gelu(approximate):
    x = torch.randn(4, 5, 30)
    theirs = torch.nn.LayerNorm(30)
    ours = bert_fast.nn.LayerNorm(30)
    ours.load_state_dict(theirs.state_dict())
    assert (ours(x, x) - theirs(x + x)).abs().max() < 2e-6
    gelus = bert_fast.nn.GELU(approximate), torch.nn.GELU(approximate)
    assert (gelus[0](x) - gelus[1](x)).abs().max() < 2e-6


def test_dropout_is_torchs_in_number_and_place():
    _, ours = pair(dropout=0.5)
    x = torch.ones(3, 9, 36)
    assert not torch.equal(ours(x), ours(x))
    ours.eval()
    assert torch.equal(ours(x), ours(x))


def test_bad_arguments_are_said():
    for option, value in (("norm_first", True), ("batch_first", False), ("bias", False)):
        with pytest.raises(ValueError, match=f"{option} must be"):
            bert_fast.nn.EncoderLayer(*SIZES, **{option: value})
    with pytest.raises(ValueError, match="activation must be 'gelu', not 'relu'"):
        bert_fast.nn.EncoderLayer(*SIZES, activation="relu")
    layer = bert_fast.nn.EncoderLayer(*SIZES)
    with pytest.raises(ValueError, match="src_mask: masks by pair"):
        layer(torch.zeros(1, 2, 36), src_mask=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"key_padding_mask must be \(1, 2\)"):
        layer(torch.zeros(1, 2, 36), src_key_padding_mask=torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"with cu_seqlens x must be"):
        layer(torch.zeros(1, 2, 36), cu_seqlens=cu_seqlens([2]))
