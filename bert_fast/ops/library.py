"""The plumbing between an op's file and ``torch.library``, so that ``torch.compile``,
``torch.export`` and activation checkpointing see through every op.

An op's file defines its schema and the kernels behind it, what it returns in shapes and dtypes
alone (fake), its gradient, and its behaviour under autocast, all by what is here.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

_library = torch.library.Library("bert_fast", "DEF")
_kernels: dict = {}  # an op's name -> the function that runs its kernels
_functions: dict = {}  # an op's name -> its torch.autograd.Function
# What an op may be given where nobody but autograd wants to know of the call.
_PLAIN = frozenset({
    Tensor, torch.nn.Parameter, int, float, bool, str, type(None), torch.dtype,
})  # fmt: skip


def define(schema, absent=()):
    """Registers a function as the kernel-running implementation of ``bert_fast::<schema>``. Where
    it returns None, for a schema has no optional results, the op returns an empty tensor: of the
    dtype that ``absent`` has for this output, or of its first floating-point argument's."""
    name = schema[: schema.index("(")]

    def register(function):
        def registered(*args):
            like = next(a for a in args if isinstance(a, Tensor) and a.is_floating_point())
            return tuple(
                like.new_empty(0, dtype=dtype) if found is None else found
                for found, dtype in zip(function(*args), absent, strict=True)
            )

        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, registered if absent else function, "CompositeExplicitAutograd")
        _kernels[name] = function
        return function

    return register


def call(name, needs_grad, *args):
    """An op's results, all arguments given: through ``torch.library`` where something looks on (a
    compiler, an exporter, a mode, a transform, a tensor's own class), which costs as much as the
    kernels' launch; else straight from the kernels, in training by a plain autograd.Function. What
    is absent is then None."""
    if not is_unseen(args):
        return getattr(torch.ops.bert_fast, name)(*args)
    if not needs_grad:
        return _kernels[name](*args)
    if name in _functions:
        return _functions[name].apply(*args)
    return getattr(torch.ops.bert_fast, name)(*args)  # a gradient's: refused


def call_backward(name, *args):
    """:func:`call` of an op's gradient. Where a graph of it is wanted, whoever differentiates it is
    refused: also where none of its arguments is known to need a gradient, for what was kept of the
    op's inputs does not tell."""
    graphed = torch.is_grad_enabled()
    tensors = (t for t in args if isinstance(t, Tensor))
    needs_grad = graphed and needs_grad_of(*tensors)
    results = call(name, needs_grad, *args)
    return refused(results) if graphed and not needs_grad and is_unseen(args) else results


def refused(results):
    """The same, of which whoever differentiates them is refused."""
    return _Refusing.apply(torch.empty(0, requires_grad=True), *results)


class _Refusing(torch.autograd.Function):
    """Its arguments but the first, which are refused a gradient."""

    @staticmethod
    def forward(ctx, anchor, *results):
        return results

    @staticmethod
    def backward(ctx, *douts):
        return _no_second_order(ctx)


def is_unseen(args):
    """Whether nobody but autograd wants to know of a call with these arguments."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ) and _PLAIN.issuperset(map(type, args))


def fake(name):
    return torch.library.register_fake(f"bert_fast::{name}", lib=_library)


def register_autograd(name, backward, save):
    """The op's gradient, ``backward(ctx, *douts)``, of what ``save(ctx, inputs, output)`` kept."""
    torch.library.register_autograd(
        f"bert_fast::{name}", backward, setup_context=save, lib=_library
    )

    def forward(ctx, *inputs):
        output = _kernels[name](*inputs)
        save(ctx, inputs, output if isinstance(output, tuple) else (output,))
        ctx.set_materialize_grads(False)  # zeros for every output, a kernel each
        return output

    def given(ctx, *douts):
        if douts[0] is None:  # by a function behind, in the place of zeros
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *douts)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(given)}
    _functions[name] = type(f"bert_fast_{name}", (torch.autograd.Function,), methods)


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
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def autocast(*tensors):
    """What torch.autocast does to a list of op arguments: fp32 and 16-bit floats take its dtype."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return tensors
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
