"""Launches of Triton kernels that do not ask anew, every time, what they asked before.

``JITFunction.run`` binds arguments, describes them and looks the compiled kernel up by a string of
it all, 20 us a launch where the launch itself is 1. :func:`kernel` makes kernels with the same
syntax, ``kernel[grid](*args, **constants)``, that keep each ``CompiledKernel`` by what Triton
specialises it for: dtypes and alignment of pointers, width of integers, whether they are 1 or
multiples of 16, constants, options, the device. Whatever is new or unusual goes Triton's own way.

What was launched once can be launched again with other tensors of the same dtypes and strides, and
nothing of it is looked up: :func:`recorded`, :class:`Launch`.
"""

import contextlib
import functools
import inspect
import itertools
import threading

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

try:
    from triton import knobs
except ImportError:  # before 3.4
    knobs = None

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
        return Kernel(function, **options) if type(made) is JITFunction else _noted(made)

    return decorate


def _noted(interpreted):
    run = interpreted.run

    def noted(*args, grid, warmup, **constants):
        run(*args, grid=grid, warmup=warmup, **constants)
        if _recorded.launches is not None:
            _recorded.launches.append(Launch(interpreted, grid, args, constants))

    interpreted.run = noted
    return interpreted


class _Recorded(threading.local):
    launches: list | None = None


_recorded = _Recorded()


@contextlib.contextmanager
def recorded():
    """A list, to which each launch of this thread adds its :class:`Launch`; or None where it cannot
    be made again so: it was new, unusual, or of tensors that are not aligned."""
    outer, _recorded.launches = _recorded.launches, []
    try:
        yield _recorded.launches
    finally:
        _recorded.launches = outer


class Launch:
    """A launch that took place, to be made again with tensors in the place of its own."""

    def __init__(self, kernel, grid, args, constants, found=None, values=()):
        self.kernel, self.grid, self.constants, self.found = kernel, grid, constants, found
        self.args, self.values = args, values  # tensors and numbers; and addresses of the tensors
        self.places = {}  # name -> where this tensor stands, which may be in others' places, too

    def __getitem__(self, name):
        return self.args[self.kernel.arg_names.index(name)]

    def can_replace(self, *names):
        """Prepares :meth:`again` for these arguments. Whether they are different tensors."""
        places = {}
        for place, given in enumerate(self.args):
            if not isinstance(given, torch.Tensor):
                break  # numbers follow
            places.setdefault(id(given), []).append(place)
        self.places = {name: places[id(self[name])] for name in names}
        return len({place[0] for place in self.places.values()}) == len(names)

    def forget(self):
        """Keeps alive none of the tensors that are to be replaced."""
        gone = set(itertools.chain.from_iterable(self.places.values()))
        self.args = [None if place in gone else arg for place, arg in enumerate(self.args)]

    def again(self, **tensors):
        """Launches on the current stream. ``tensors``: for each argument that
        :meth:`can_replace` was asked of one of its own's dtype, shape and strides, on its device,
        which is the current one. Nothing is kept of them: threads may share a launch."""
        if self.found is not None:
            values, addresses = [*self.values], 0
            for name, tensor in tensors.items():
                address = tensor.data_ptr()
                addresses |= address
                for place in self.places[name]:
                    values[place] = address
            if not addresses & 15:  # as all of the recorded ones are
                _, run, function, metadata, fixed = self.found
                x, y, z = (*self.grid, 1, 1)[:3]
                active = driver.active
                stream = active.get_current_stream(active.get_current_device())
                run(x, y, z, stream, function, metadata, None, None, None, *values, *fixed)
                return
        args = [*self.args]
        for name, tensor in tensors.items():
            for place in self.places[name]:
                args[place] = tensor
        self.kernel[self.grid](*args, **self.constants)


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


def is_watched(*kernels):
    """Whether somebody looks at the launches of these, or may."""
    return (
        knobs is None
        or JITFunction.run is not _RUN
        or any(kernel.pre_run_hooks for kernel in kernels)
        or not _is_idle(knobs.runtime.launch_enter_hook)
        or not _is_idle(knobs.runtime.launch_exit_hook)
    )


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
        if is_watched(self):
            return self._plainly(grid, args, constants)
        try:
            key, given = self._read(args, constants)
        except (AttributeError, TypeError, ValueError):  # of other names, types or numbers
            key, given = self._read_anew(args, constants)
        if key is None:
            return self._plainly(grid, args, constants)
        active = driver.active
        device = active.get_current_device()
        key = device, key
        found = self._compiled.get(key)
        if found is None:
            compiled = self._plainly(grid, args, constants)
            if _is_plain(compiled):
                fixed = tuple(constants[name] for name in self.arg_names[len(args) :])
                self._compiled[key] = (
                    compiled, compiled.run, compiled.function, compiled.packed_metadata, fixed
                )  # fmt: skip
            return compiled
        compiled, run, function, metadata, fixed = found
        x, y, z = (*grid, 1, 1)[:3]
        stream = active.get_current_stream(device)
        run(x, y, z, stream, function, metadata, None, None, None, *given, *fixed)
        if (launches := _recorded.launches) is not None:
            aligned = key[1][1] == 0
            launches.append(Launch(self, grid, args, constants, found, given) if aligned else None)
        return compiled

    def _plainly(self, grid, args, constants):
        if _recorded.launches is not None:
            _recorded.launches.append(None)
        return self.run(*args, grid=grid, warmup=False, **constants)

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
            return read(args, constants)
        except (AttributeError, TypeError, ValueError):
            return None, None


def _is_plain(compiled):
    """A kernel of NVIDIA's backend: others specialise for more than :func:`_reader` reads."""
    target = getattr(getattr(compiled, "metadata", None), "target", None)
    return getattr(target, "backend", None) == "cuda"


def _unknown(args, constants):
    raise TypeError


def _reader(kernel, args, constants):
    """A function of a launch's arguments and constants that gives its key (None: an integer of 64
    bits) and the arguments for the launch, pointers as addresses. It reads arguments of these kinds
    alone, tensors where these are tensors, and constants of these names in this order, which all
    stand behind the arguments."""
    names = kernel.arg_names[: len(args)]
    fixed = kernel.params[len(args) :]
    if not all(p.is_constexpr and p.name in constants for p in fixed):
        return _unknown
    pointers, integers, key, given = [], [], [], []
    for parameter, name, value in zip(kernel.params, names, args, strict=False):
        if isinstance(value, torch.Tensor) and not parameter.is_constexpr:
            pointers.append(name)
            given.append(f"_{name}")
            key.append(f"{name}.dtype")
        elif type(value) in (int, float) and not parameter.is_constexpr:
            given.append(name)
            key.append(f"{name}.__class__")
            if type(value) is int:
                integers.append(f"({name} + 2147483648)")
                if not parameter.do_not_specialize:
                    key.append(f"1 if {name} == 1 else {name} & 15 and 2")
        else:
            return _unknown
    if not pointers:
        return _unknown
    lines = [
        "def read(args, constants):",
        f" {', '.join(names)}, = args",
        f" if (*constants,) != {tuple(constants)}: raise TypeError",
        *(f" _{name} = {name}.data_ptr()" for name in pointers),
        f" if ({' | '.join(integers) or 0}) >> 32: return None, None",
        f" aligned = ({' | '.join(f'_{name}' for name in pointers)}) & 15",
        f" if aligned: aligned = ({', '.join(f'_{name} & 15 == 0' for name in pointers)},)",
        f" key = {next(_numbers)}, aligned, {', '.join(key)}, *constants.values()",
        f" return key, ({', '.join(given)},)",
    ]
    scope: dict = {}
    exec("\n".join(lines), scope)
    return scope["read"]
