"""What every op checks before any kernel runs: a message names the argument and what it must be."""

import itertools
from typing import Literal

import torch
from torch import Tensor

Approximate = Literal["none", "tanh"]


def check(ok, message, error=ValueError):
    """A message that names a number of tokens is a function: tracing then does not ask for it, and
    compiles once for all."""
    if not ok:
        raise error(message() if callable(message) else message)


def shape_of(tensor):
    return None if tensor is None else tuple(tensor.shape)


def check_tensors(first, **others):
    """Tensors where tensors belong, floating, on one device. ``first`` is (name, tensor)."""
    name, tensor = first
    device = tensor.device if isinstance(tensor, Tensor) else None
    for t in (tensor, *others.values()):
        if t is None:
            continue
        if not (isinstance(t, Tensor) and t.is_floating_point() and t.device == device):
            break
    else:  # and no message was made
        return
    for n, t in {name: tensor, **others}.items():
        if t is None:
            continue
        check(isinstance(t, Tensor), f"{n} must be a tensor, not {type(t).__name__}", TypeError)
        check(t.is_floating_point(), f"{n} must be floating point, not {t.dtype}", TypeError)
        check(t.device == tensor.device, f"{n} is on {t.device}, {name} on {tensor.device}")


def check_same_dtype(first, **others):
    name, tensor = first
    for n, t in others.items():
        if t is not None and t.dtype != tensor.dtype:
            raise TypeError(f"{n} is {t.dtype}, {name} is {tensor.dtype}: they must agree")


def check_vector(name, tensor, width):
    check(
        tensor is None or shape_of(tensor) == (width,),
        lambda: f"{name} must have shape ({width},), not {shape_of(tensor)}",
    )


def is_concrete(tensor):
    """Whether the values can be looked at without tracing trouble and without a wait."""
    return (
        not torch.compiler.is_compiling() and type(tensor) is Tensor and tensor.device.type == "cpu"
    )


def check_cu_seqlens(name, cu_seqlens, tokens, device, max_seqlen, padded_tail):
    """Validates what can be seen without waiting for a device; returns max_seqlen."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be a tensor")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, not {cu_seqlens.dtype}")
    check(
        cu_seqlens.ndim == 1 and cu_seqlens.numel() >= 1,
        lambda: f"{name} must have shape (batch + 1,), not {shape_of(cu_seqlens)}",
    )
    check(
        cu_seqlens.device == device,
        lambda: f"{name} is on {cu_seqlens.device}, the tokens on {device}",
    )
    if not is_concrete(cu_seqlens):
        return tokens if max_seqlen is None else max_seqlen
    offsets = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in itertools.pairwise(offsets)]
    check(offsets[0] == 0, f"{name} must start at 0, not {offsets[0]}")
    check(min(lengths, default=0) >= 0, f"{name} must not decrease: {offsets}")
    if padded_tail:
        check(
            offsets[-1] <= tokens, lambda: f"{name} ends at {offsets[-1]}, past the {tokens} rows"
        )
    else:
        check(
            offsets[-1] == tokens,
            lambda: f"{name} ends at {offsets[-1]}, but there are {tokens} tokens",
        )
    longest = max(lengths, default=0)
    check(
        max_seqlen is None or max_seqlen >= longest,
        lambda: f"max_seqlen is {max_seqlen}, but {name} holds a sequence of {longest}",
    )
    return longest if max_seqlen is None else max_seqlen


def check_dropout(dropout_p, seed, device):
    """Returns the seed as an int64 tensor of one element on ``device``, or None without dropout."""
    if dropout_p == 0:
        return None
    check(0.0 <= dropout_p < 1.0, lambda: f"dropout_p must be in [0, 1), not {dropout_p}")
    if seed is None:
        return torch.randint(2**62, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        check(
            seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == device,
            lambda: (
                f"seed must be one int64 on {device}, "
                f"not {shape_of(seed)} {seed.dtype} on {seed.device}"
            ),
        )
        return seed.reshape(1)
    check(
        isinstance(seed, int) and 0 <= seed < 2**63,
        lambda: f"seed must be an integer in [0, 2**63), not {seed!r}",
    )
    # Not torch.tensor, which waits for the device and cannot be captured in a graph.
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def check_approximate(approximate):
    check(
        approximate in ("none", "tanh"),
        lambda: f"approximate must be 'none' or 'tanh', not {approximate!r}",
    )


def check_out(out, like, needs_grad, device=None):
    device = device or like.device
    check(
        not needs_grad,
        "out= writes in place, which autograd cannot follow: call without out, or under "
        "torch.no_grad()",
        RuntimeError,
    )
    check(
        out.shape == like.shape and out.dtype == like.dtype and out.device == device,
        lambda: (
            f"out must be {shape_of(like)} {like.dtype} on {device}, "
            f"not {shape_of(out)} {out.dtype} on {out.device}"
        ),
    )
    check(out.is_contiguous(), "out must be contiguous")
