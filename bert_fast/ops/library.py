"""The plumbing between an op's file and ``torch.library``, so that ``torch.compile``,
``torch.export`` and activation checkpointing see through every op.

An op's file defines its schema and the kernels behind it, what it returns in shapes and dtypes
alone (fake), its gradient, and its behaviour under autocast, all by what is here.
"""

import torch

_library = torch.library.Library("bert_fast", "DEF")


def define(schema):
    """Registers a function as the kernel-running implementation of ``bert_fast::<schema>``."""
    name = schema[: schema.index("(")]

    def register(function):
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


def fake(name):
    return torch.library.register_fake(f"bert_fast::{name}", lib=_library)


def register_autograd(name, backward, save):
    """The op's gradient, ``backward(ctx, *douts)``, of what ``save(ctx, inputs, output)`` kept."""
    torch.library.register_autograd(
        f"bert_fast::{name}", backward, setup_context=save, lib=_library
    )


def _no_second_order(ctx, *_):
    raise NotImplementedError(
        "bert_fast's kernels have no second derivative; backend='eager' has every one"
    )


def refuse_second_derivative(name):
    """For an op's ``<name>_backward``."""
    torch.library.register_autograd(f"bert_fast::{name}", _no_second_order, lib=_library)


def register_autocast(name, num_activations):
    """Autocast for direct calls of ``torch.ops.bert_fast.<name>``: its first arguments are cast."""
    op = getattr(torch.ops.bert_fast, name)
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast(*args, _device=device, _keys=keys):
            activations = autocast(*args[:num_activations]) if num_activations else ()
            with torch._C._ExcludeDispatchKeyGuard(_keys):
                return op(*activations, *args[num_activations:])

        _library.impl(name, cast, key)


def needs_grad_of(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast(*tensors):
    """What torch.autocast does to a list of op arguments: fp32 and 16-bit floats take its dtype."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def rows_contiguous(tensor):
    """Kernels take any strides but the last dimension's."""
    return tensor if tensor.stride(-1) == 1 or tensor.numel() == 0 else tensor.contiguous()


def contiguous_like(tensor):
    return tensor.new_empty(tensor.shape)
