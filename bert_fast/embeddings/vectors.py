"""What is done with vectors: cut, quantised, compared; as sentence-transformers does it."""

import numpy as np
import torch
import torch.nn.functional as F

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")


def quantize(vectors, precision):
    """(n, width) floats as ``int8`` or ``uint8``, 256 steps between each column's least and
    greatest; or as bits, eight to a byte (``binary``: signed, ``ubinary``).

    Raises:
        ValueError: int8 or uint8 of a single vector, which has no range.
    """
    if precision == "float32":
        return vectors.astype(np.float32)
    if precision in ("binary", "ubinary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return bits if precision == "ubinary" else (bits - 128).astype(np.int8)
    if len(vectors) < 2:
        raise ValueError(
            f"precision {precision!r} takes each column's range from the vectors: more than one "
            "text is needed"
        )
    low, high = vectors.min(0), vectors.max(0)
    steps = (high - low) / 255
    steps = np.where(steps == 0, 1, steps)
    values = np.clip(np.floor((vectors - low) / steps), 0, 255)
    return values.astype(np.uint8) if precision == "uint8" else (values - 128).astype(np.int8)


def _rows(vectors):
    vectors = torch.as_tensor(np.asarray(vectors) if isinstance(vectors, list) else vectors)
    vectors = vectors if vectors.is_floating_point() else vectors.float()
    return vectors[None] if vectors.ndim == 1 else vectors


def _cosine(a, b):
    return F.normalize(a, dim=-1), F.normalize(b, dim=-1)


def _all_pairs(name):
    if name in ("cosine", "dot"):
        return lambda a, b: a @ b.t()
    return lambda a, b: -torch.cdist(a, b, p=2.0 if name == "euclidean" else 1.0)


def _pairwise(name):
    if name in ("cosine", "dot"):
        return lambda a, b: (a * b).sum(-1)
    if name == "euclidean":
        return lambda a, b: -(a - b).square().sum(-1).sqrt()
    return lambda a, b: -(a - b).abs().sum(-1)


SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


def similarity(name, a, b, pairwise=False):
    """Scores of all pairs (n, m), or of the rows together (n,); the greater the more alike."""
    a, b = _rows(a), _rows(b)
    if name == "cosine":
        a, b = _cosine(a, b)
    return (_pairwise if pairwise else _all_pairs)(name)(a, b)
