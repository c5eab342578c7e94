"""On a CPU a text's result does not depend, to the bit, on what else is in its call: through the
encoder, pooling, every further module and a classifier's head."""

import numpy as np
import pytest
import torch
from checkpoints import TEXTS, cross_encoder, sentence_transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

import bert_fast
from bert_fast import _C

DTYPES = [
    pytest.param(
        None,
        marks=pytest.mark.skipif(
            _C.linear_kind(0) == "amx", reason="on AMX few rows in float32 are rounded otherwise"
        ),
    ),
    "bfloat16",
    "int8",
]
CALLS = settings(deadline=None, max_examples=25)


def some_of(count):
    return st.lists(st.integers(0, count - 1), min_size=1, max_size=9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sentence_encoder(dtype, tmp_path):
    modes = Pooling(32, pooling_mode=("cls", "max", "mean"))
    dense = Dense(96, 40, activation_function=torch.nn.Tanh())
    residual = Dense(40, 24, use_residual=True, activation_function=torch.nn.GELU())
    modules = modes, dense, LayerNorm(40), residual, Normalize()
    _, directory = sentence_transformer(tmp_path, *modules)
    encoder = bert_fast.SentenceEncoder(directory, dtype=dtype)
    alone = np.stack([encoder.encode(text) for text in TEXTS])

    @CALLS
    @given(which=some_of(len(TEXTS)), batch_tokens=st.integers(1, 90))
    def check(which, batch_tokens):
        found = encoder.encode([TEXTS[i] for i in which], batch_tokens=batch_tokens)
        assert np.array_equal(found, alone[which])

    check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_labels", [1, 3])
def test_cross_encoder(dtype, num_labels, tmp_path):
    _, directory = cross_encoder(tmp_path, num_labels)
    ranker = bert_fast.CrossEncoder(directory, dtype=dtype)
    pairs = [("the film", text) for text in TEXTS]
    alone = np.stack([ranker.predict([pair])[0] for pair in pairs])

    @CALLS
    @given(which=some_of(len(pairs)), batch_tokens=st.integers(1, 90))
    def check(which, batch_tokens):
        found = ranker.predict([pairs[i] for i in which], batch_tokens=batch_tokens)
        assert np.array_equal(found, alone[which])

    check()
