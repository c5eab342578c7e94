"""Launches of Triton kernels that do not ask anew, every time, what they asked before.

``JITFunction.run`` binds arguments, describes them and looks the compiled kernel up by a string of
it all, 20 us a launch where the launch itself is 1. :func:`kernel` makes kernels with the same
syntax, ``kernel[grid](*args, **constants)``, that keep each ``CompiledKernel`` by what Triton
specialises it for: dtypes and alignment of pointers, width of integers, whether they are 1 or
multiples of 16, constants, options, the device. Whatever is new or unusual goes Triton's own way.
"""

import functools
import inspect
import itertools

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_RUN = JITFunction.run
_numbers = itertools.count()  # of readers: keys of two are never equal
# What a launch is in Triton 3.6 to 3.9. Where it is another, nothing here is used.
_KNOWN = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, "
    "launch_metadata, knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, "
    "*bound_args.values())"
)


def kernel(**options):
    """``triton.jit`` for what the host launches; the interpreter's where that is asked for."""

    def decorate(function):
        made = triton.jit(function, **options)
        return Kernel(function, **options) if type(made) is JITFunction else made

    return decorate


@functools.cache
def _as_known():
    """Whether this Triton launches as the module's own way assumes."""
    try:
        source = " ".join(inspect.getsource(_RUN).split())
        hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    except (AttributeError, OSError, TypeError):
        return False
    return _KNOWN in source and all(_is_idle(hook) for hook in hooks)


def _is_idle(hook):
    return hook is None or not getattr(hook, "calls", True)


class Kernel(JITFunction):
    """A kernel whose launches are looked up by a cheap key."""

    def __init__(self, function, **options):
        super().__init__(function, **options)
        self._readers = {}  # number of arguments and names of constants -> _reader's
        self._read = _unknown  # the latest of them
        self._compiled = {}  # device and key -> what a launch needs

    def __getitem__(self, grid):
        return functools.partial(self._launch, grid)

    def _launch(self, grid, *args, **constants):
        runtime = knobs.runtime
        if (
            JITFunction.run is not _RUN  # somebody looks on
            or self.pre_run_hooks
            or not (_is_idle(runtime.launch_enter_hook) and _is_idle(runtime.launch_exit_hook))
        ):
            return self.run(*args, grid=grid, warmup=False, **constants)
        try:
            key, given = self._read(*args, **constants)
        except (AttributeError, TypeError):  # of other names or types than when it was made
            key, given = self._read_anew(args, constants)
        if key is None:
            return self.run(*args, grid=grid, warmup=False, **constants)
        active = driver.active
        device = active.get_current_device()
        key = device, key
        found = self._compiled.get(key)
        if found is None:
            compiled = self.run(*args, grid=grid, warmup=False, **constants)
            if _is_plain(compiled):
                launched = compiled, compiled.run, compiled.function, compiled.packed_metadata
                self._compiled[key] = launched
            return compiled
        compiled, run, function, metadata = found
        x, y, z = (*grid, 1, 1)[:3]
        stream = active.get_current_stream(device)
        run(x, y, z, stream, function, metadata, None, None, None, *given)
        return compiled

    def _read_anew(self, args, constants):
        """By a reader for arguments of this number and constants of these names."""
        if not _as_known():
            return None, None
        kind = (len(args), *constants)
        read = self._readers.get(kind)
        if read is None:
            read = self._readers[kind] = _reader(self, args, constants)
        self._read = read
        try:
            return read(*args, **constants)
        except (AttributeError, TypeError):
            return None, None


def _is_plain(compiled):
    """A kernel of NVIDIA's backend: others specialise for more than :func:`_reader` reads."""
    target = getattr(getattr(compiled, "metadata", None), "target", None)
    return getattr(target, "backend", None) == "cuda"


def _unknown(*args, **constants):
    raise TypeError


def _reader(kernel, args, constants):
    """A function of a launch's arguments that gives its key (None: an integer of 64 bits) and the
    values for the launch, pointers as addresses. It reads arguments of these kinds alone, tensors
    where these are tensors."""
    names = kernel.arg_names
    pointers, integers, key, given = [], [], [], []
    for parameter, name in zip(kernel.params, names, strict=True):
        number = parameter.num
        value = args[number] if number < len(args) else constants.get(name)
        if parameter.is_constexpr:
            if number >= len(args) and name not in constants:
                return _unknown  # a default of the kernel's
            given.append(name)
            key.append(name)
        elif number >= len(args):
            return _unknown
        elif isinstance(value, torch.Tensor):
            pointers.append(name)
            given.append(f"_{name}")
            key.append(f"{name}.dtype")
        elif type(value) is int:
            integers.append(name)
            given.append(name)
            key.append(f"{name}.__class__")
            if not parameter.do_not_specialize:
                key.append(f"1 if {name} == 1 else {name} & 15 and 2")
        elif type(value) is float:
            given.append(name)
            key.append(f"{name}.__class__")
        else:
            return _unknown
    key += [name for name in constants if name not in names]
    if not pointers:
        return _unknown
    anded = " | ".join(f"_{name}" for name in pointers)
    each = ", ".join(f"_{name} & 15 == 0" for name in pointers)
    wide = " | ".join(f"({name} + 2147483648)" for name in integers) or "0"
    parameters = [*names[: len(args)], *(["*", *constants] if constants else [])]
    lines = [
        f"def read({', '.join(parameters)}):",
        *(f" _{name} = {name}.data_ptr()" for name in pointers),
        f" if ({wide}) >> 32: return None, None",
        f" aligned = (({anded}) & 15) and ({each},)",
        f" return ({next(_numbers)}, aligned, {', '.join(key)}), ({', '.join(given)},)",
    ]
    scope: dict = {}
    exec("\n".join(lines), scope)
    return scope["read"]
