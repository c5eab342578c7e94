"""Whether somebody looks into a model, or computes in its place; and whether it still is what it
was when its graphs were captured."""

from __future__ import annotations

import types
from operator import itemgetter

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

_ASKED = "output_hidden_states", "output_attentions", "return_dict", "_attn_implementation"
# Whose modules go by tensors, submodules and plain values alone.
_KNOWN = {"torch", "transformers", "bert_fast"}
_PLAIN = (bool, int, float, str, type(None), torch.dtype, types.FunctionType,
          types.BuiltinFunctionType)  # fmt: skip


class Watch:
    """A model as it was when its graphs were captured: they read what was its own then."""

    def __init__(self, model):
        self.config = model.config
        self.asked = [getattr(self.config, name, None) for name in _ASKED]
        self.tensors, self.parents, self.modules, self.values = [], [], [], []
        self.has_others = False  # what cannot be watched: adapters, classes of a user's own
        self._remember(self.config)
        for module in model.modules():
            own = module.__dict__
            for of in (own["_parameters"], own["_buffers"]):
                self.tensors += [(of, n, t, t.data_ptr()) for n, t in of.items() if t is not None]
            if own["_modules"]:
                self.parents.append((own["_modules"], tuple(own["_modules"].values())))
            hooks = own["_forward_hooks"], own["_forward_pre_hooks"]
            self.modules.append((module, type(module), own, *hooks))
            self._remember(module)
            library = type(module).__module__.partition(".")[0]
            if library not in _KNOWN or isinstance(module, ParametrizationList):
                self.has_others = True

    def _remember(self, thing):
        """Its plain values: an eps, a scale, the number of heads, whether it is in training."""
        own = getattr(thing, "__dict__", {})
        names = [name for name, value in own.items() if _is_plain(value)]
        if names:
            get = itemgetter(*names)
            self.values.append((own, get, get(own)))

    def is_as_it_was(self):
        """In every call: some 0.4 us a module and parameter."""
        for of, name, tensor, place in self.tensors:
            if of.get(name) is not tensor or tensor.data_ptr() != place:
                return False
        for of, children in self.parents:
            if tuple(of.values()) != children:
                return False
        if any(type(module) is not kind for module, kind, *_ in self.modules):
            return False
        try:
            if any(get(own) != values for own, get, values in self.values):
                return False
        except KeyError:  # one was deleted
            return False
        return self.asked == [getattr(self.config, name, None) for name in _ASKED]

    def is_looked_into(self):
        """Whether somebody looks at what the modules do, or does it in their place."""
        if self.has_others or are_all_watched():
            return True
        for _, _, own, hooks, before in self.modules:
            if ((hooks or before) and _watched(own)) or "forward" in own:
                return True
        return False


def is_watched(module):
    """Whether somebody looks at what this module is given or gives, or computes in its place."""
    own = module.__dict__
    looks = own["_forward_hooks"] or own["_forward_pre_hooks"]
    looks = looks or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(looks or "forward" in own or own.get("_compiled_call_impl"))


def are_all_watched():
    """The same of every module at once."""
    every = nn.modules.module
    return bool(
        every._global_forward_hooks or every._global_forward_pre_hooks
        or every._global_backward_hooks or every._global_backward_pre_hooks
    )  # fmt: skip


def _is_plain(value):
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _watched(own):
    """By others than transformers, whose own hooks record hidden states when it is asked to."""
    hooks = *own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()
    return not all(str(getattr(h, "__module__", "")).startswith("transformers.") for h in hooks)
