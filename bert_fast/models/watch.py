"""Whether somebody looks into a model, or computes in its place; and whether it still is what it
was when its graphs were captured."""

from __future__ import annotations

import sys
import types
from operator import itemgetter

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

_ASKED = "output_hidden_states", "output_attentions", "return_dict", "_attn_implementation"
# Whose modules go by tensors, submodules and plain values alone.
_KNOWN = {"torch", "transformers", "bert_fast"}
_PLAIN = (bool, int, float, str, type(None), torch.dtype, types.FunctionType,
          types.BuiltinFunctionType)  # fmt: skip
_TENSORS = Tensor, nn.Parameter


class Watch:
    """A model as it was when its graphs were captured: they read what was its own then."""

    def __init__(self, model):
        self.config = model.config
        self.asked = [getattr(self.config, name, None) for name in _ASKED]
        self.holders, self.hooks, self.values = [], [], []
        self.modules = list(model.modules())
        self.kinds = list(map(type, self.modules))
        self.has_others = False  # what cannot be watched: adapters, classes of a user's own
        self._remember(self.config)
        for module in self.modules:
            own = module.__dict__
            for name in ("_parameters", "_buffers", "_modules"):
                if own[name]:
                    self.holders.append(own[name])
            self.hooks.append((own, own["_forward_hooks"], own["_forward_pre_hooks"]))
            self._remember(module)
            library = type(module).__module__.partition(".")[0]
            if library not in _KNOWN or isinstance(module, ParametrizationList):
                self.has_others = True
        self.held = [dict(of) for of in self.holders]
        every = [(of, n, t) for of in self.holders for n, t in of.items() if isinstance(t, Tensor)]
        self.tensors = [t for *_, t in every]
        self.places = list(map(Tensor.data_ptr, self.tensors))
        self.gets, self.then = [v[:2] for v in self.values], [v[2] for v in self.values]
        # Dictionaries with others in them may compare as equal (below).
        self.comparable = [x for x in every if x[2].numel() == 1 or type(x[2]) not in _TENSORS]

    def _remember(self, thing):
        """Its plain values: an eps, a scale, the number of heads, whether it is in training."""
        own = getattr(thing, "__dict__", {})
        names = [name for name, value in own.items() if _is_plain(value)]
        if names:
            get = itemgetter(*names)
            self.values.append((own, get, get(own)))

    def is_as_it_was(self):
        """In every call: some 0.1 us a module and parameter, for nearly all is done in C."""
        if not self._holds_what_it_did() or list(map(Tensor.data_ptr, self.tensors)) != self.places:
            return False
        if list(map(type, self.modules)) != self.kinds:
            return False
        try:
            if [get(own) for own, get in self.gets] != self.then:
                return False
        except KeyError:  # one was deleted
            return False
        return self.asked == [getattr(self.config, name, None) for name in _ASKED]

    def _holds_what_it_did(self):
        """The same parameters, buffers and submodules by the same names."""
        try:
            # What is the same object is equal. Of others, tensors of several numbers refuse to say.
            if self.holders != self.held:
                return False
        except Exception:
            return False
        return all(of.get(name) is tensor for of, name, tensor in self.comparable)

    def is_looked_into(self):
        """Whether somebody looks at what the modules do, or does it in their place."""
        if self.has_others or are_all_watched():
            return True
        for own, hooks, before in self.hooks:
            if ((hooks or before) and _watched(own)) or "forward" in own:
                return True
        return False


def is_watched(module):
    """Whether somebody looks at what this module is given or gives, or computes in its place."""
    own = module.__dict__
    looks = own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    after = own["_forward_hooks"]
    looks = looks or (after and not all(map(_is_idle, after.values())))
    return bool(looks or "forward" in own or own.get("_compiled_call_impl"))


def _is_idle(hook):
    """One of those that transformers 5 leaves for good on what gives hidden states, once they were
    asked for, while they are not."""
    module = getattr(hook, "__module__", None)
    if module != "transformers.utils.output_capturing":
        return False
    collector = getattr(sys.modules.get(module), "_active_collector", None)
    return collector is not None and not collector.get()  # what is asked for, and found so far


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
