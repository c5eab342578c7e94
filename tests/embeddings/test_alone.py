"""On a CPU a text's result does not depend, to the bit, on what else is in its call: through the
encoder, pooling, every further module and a classifier's head."""

import functools

import numpy as np
import pytest
import torch
from checkpoints import TEXTS, cross_encoder, sentence_transformer
from conftest import torch_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

import bert_fast
from bert_fast import _C
from bert_fast.embeddings.pooling import MODES

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


# On AMX what follows the encoder is in float32, and 32 rows or more are rounded otherwise than few.
MOST = 31 if _C.linear_kind(0) == "amx" else 80


def check(function, inputs):
    """function(some of the inputs, batch_tokens=...) gives each what it gets alone."""
    alone = np.stack([function([one])[0] for one in inputs])
    some = st.lists(st.integers(0, len(inputs) - 1), min_size=1, max_size=MOST)

    @settings(deadline=None, max_examples=25)
    @given(which=some, batch_tokens=st.integers(1, 2000), threads=st.integers(1, 3))
    def each(which, batch_tokens, threads):
        with torch_threads(threads):
            found = function([inputs[i] for i in which], batch_tokens=batch_tokens)
        assert np.array_equal(found, alone[which])

    each()
    many = list(range(len(inputs))) * (MOST // len(inputs))
    assert np.array_equal(function([inputs[i] for i in many], batch_tokens=10_000), alone[many])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sentence_encoder(dtype, tmp_path):
    modes = Pooling(32, pooling_mode=tuple(MODES))
    dense = Dense(32 * len(MODES), 39, activation_function=torch.nn.SiLU())
    residual = Dense(39, 23, use_residual=True, activation_function=torch.nn.GELU())
    modules = modes, dense, LayerNorm(39), residual, Normalize()
    _, directory = sentence_transformer(tmp_path, *modules)
    encoder = bert_fast.SentenceEncoder(directory, dtype=dtype)
    check(encoder.encode, TEXTS)
    check(functools.partial(encoder.encode, normalize_embeddings=True, truncate_dim=9), TEXTS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_labels", [1, 3])
def test_cross_encoder(dtype, num_labels, tmp_path):
    _, directory = cross_encoder(tmp_path, num_labels)
    ranker = bert_fast.CrossEncoder(directory, dtype=dtype)
    pairs = [("the film", text) for text in TEXTS]
    check(ranker.predict, pairs)
    check(
        functools.partial(ranker.predict, activation_fn=torch.nn.GELU(), apply_softmax=True), pairs
    )
