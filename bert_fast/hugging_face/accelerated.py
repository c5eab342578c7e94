"""Hugging Face models, made faster where they stand: :func:`accelerate`, :func:`restore`.

An accelerated model is the same object with the same parameters. Three of its modules change class,
to an heir of their own: the one that takes the mask (it counts the real tokens), the one that loops
over layers (it drops the padding, and puts it back) and each layer (it computes with our ops).
Gradient checkpointing, copies, pickles and DataParallel's replicas go on working, for nothing else
changes; adapters and other modules in the place of a linear layer are called. What a call asks that
the ops do not do, and a model into which somebody has put hooks or modules of other kinds, runs on
the code that was inherited.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from bert_fast import ops
from bert_fast.hugging_face.families import (
    FAMILIES,
    classes_inside,
    family_of,
    kept_of,
    output_of,
    warn_once,
    why_not,
    why_not_this_call,
    why_not_this_state,
)
from bert_fast.hugging_face.parts import Parts, describe, probability, whereabouts
from bert_fast.hugging_face.precision import check_arguments, is_plain, pack_layers
from bert_fast.models.blocks import (
    GELU_APPROXIMATE,
    as_autocast_gives,
    attention_precision,
    feed_forward,
    product_adds_bias,
    project_add_norm,
)
from bert_fast.models.inference import Precision
from bert_fast.models.one_call import OneCall
from bert_fast.models.packing import Packing, is_captured
from bert_fast.models.repeat import Layers
from bert_fast.models.watch import is_watched
from bert_fast.models.workspace import Kept, NoWorkspace, Workspace, can_reuse_memory

Model = TypeVar("Model", bound=nn.Module)


def accelerate(
    model: Model, *, prepack: bool = False, dtype: Precision | torch.dtype | None = None,
    calibration: Iterable[dict[str, torch.Tensor]] | None = None,
) -> Model:  # fmt: skip
    """Makes a Hugging Face model compute its encoder with bert_fast, in place.

    Args:
        model: any module that holds encoders of ``FAMILIES``: a model of transformers with or
            without a head, a SentenceTransformer. Its parameters, ``state_dict`` and files stay
            what they are; it can be trained and saved.
        prepack: lay the linear weights out once for inference, in float32 on the CPU as
            :meth:`bert_fast.BertModel.prepack` does; on a GPU the weights of queries, keys and
            values side by side, for one product instead of three (a quarter of a layer's memory
            again). What changes is laid out anew, but for what is written through ``.data``: on the
            CPU a few numbers, on a GPU any between two calls without ``train()`` or ``eval()``.
        dtype: "float32", "bfloat16" or "int8": as ``prepack``, with the encoder's products in that
            precision in inference, as :meth:`bert_fast.BertModel.for_inference` has them; but the
            model keeps its weights, and computes with them where gradients are wanted.
        calibration: for int8: keyword arguments of calls of the encoder; as there.

    Returns:
        ``model``. At padding it gives zeros where Hugging Face computes what nobody reads.

    Calls that want attention weights, head masks, masks by pair of tokens, a cache or
    cross-attention run as before, and a warning says so once; so does a model that has hooks, or
    modules of other kinds, inside its encoder, and what :func:`torch.jit.trace` and ONNX's exporter
    trace. Adapters of peft, quantised and parametrised linear layers are computed.

    Raises:
        ValueError: there is no encoder that can be accelerated, or one that cannot, and why;
            ``dtype`` for a model in training, not in float32 or not on the CPU.
    """
    check_arguments(model, dtype, calibration)
    # An encoder's own class tells its family; an accelerated one has been here before.
    found = [m for m in model.modules() if family_of(m) and not isinstance(m, _Accelerated)]
    done = any(isinstance(m, _Model) for m in model.modules())
    if not found and not done:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{type(model).__name__} holds none of transformers' {known}")
    for base in found:  # all or none
        if reason := why_not(base):
            raise ValueError(f"{type(base).__name__} cannot be accelerated: {reason}")
    from transformers import modeling_outputs

    for base in found:
        family = family_of(base)
        encoder = getattr(base, family.encoder)
        if "forward" in base.__dict__:
            warn_once(type(base).__name__, "a forward of its own")
        classes = classes_inside(base, family)
        for layer in encoder.layer:
            _change_class(layer, _Layer)
            layer._bert_fast = _LayerSettings(base.config, family)
        _change_class(encoder, _Encoder)
        output = getattr(modeling_outputs, family.output)
        encoder._bert_fast = output, Workspace(), family.position_bias, OneCall()
        _change_class(base, _Model)
        base._bert_fast = family, classes  # type: ignore[assignment]
    layers: list[tuple[str, Any]]
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, _Layer)]
    if dtype is not None:
        bases = [module for module in model.modules() if isinstance(module, _Model)]
        pack_layers(model, layers, bases, dtype, calibration)
    elif prepack:
        for _, layer in layers:
            layer._bert_fast.how.clear()
            layer.prepack()
    return model


def restore(model: Model) -> Model:
    """Undoes :func:`accelerate`; returns ``model``."""
    module: Any
    for module in model.modules():
        if isinstance(module, _Accelerated):
            module.__class__ = module.inherited
            module.__dict__.pop("_bert_fast", None)
    return model


class _Run:
    """One forward's tokens: layers get it in the place of their attention mask."""

    def __init__(self, packing, workspace, position_bias, parts, where):
        self.packing, self.workspace, self.position_bias = packing, workspace, position_bias
        self.parts, self.where = parts, where

    def parts_of(self, layer):
        if torch.compiler.is_compiling():
            return Parts(layer, layer._bert_fast.family)
        if (parts := self.parts.get(layer)) is None:
            parts = self.parts[layer] = Parts(layer, layer._bert_fast.family)
        return parts

    def describe(self, layer):
        return describe(layer, self)


# From _Model to _Encoder. torch.compile cannot trace a ContextVar; what it traces uses the list,
# and so does what runs beside it after a graph break.
_packing = contextvars.ContextVar("bert_fast_packing", default=None)
_traced: list[tuple | None] = [None]


def _hand_over(handed):
    if torch.compiler.is_compiling():
        _traced[0] = handed
        return None
    return _packing.set(handed)


def _take_back(token):
    _traced[0] = None
    if token is not None:
        _packing.reset(token)


def _handed_over():
    if torch.compiler.is_compiling() or _traced[0] is not None:
        return _traced[0]
    return _packing.get()


class _Accelerated:
    inherited: Any = None  # the class that accelerate found
    parameters_by_place: tuple[str, ...] = ()  # of its forward, by name

    def __reduce_ex__(self, protocol):  # the class is made when needed, so pickle cannot name it
        return _remake, (self.inherited, type(self).__mro__[1]), self.__dict__


def _remake(kind, mixin):
    module = kind.__new__(kind)
    _change_class(module, mixin)
    return module


def _change_class(module, mixin):
    module.__class__ = _heir(type(module), mixin)


@functools.cache
def _heir(kind, mixin):
    """A subclass of ``kind`` by its own name and signature: transformers reads both."""
    heir = type(kind.__name__, (mixin, kind), {"__module__": kind.__module__, "inherited": kind})
    heir.__qualname__, heir.__doc__ = kind.__qualname__, kind.__doc__
    heir.parameters_by_place = _parameters(kind.forward)
    if mixin is _Model:

        @functools.wraps(kind.forward)  # a function of its own: it bears this family's signature
        def forward(self, *args, **kwargs):
            return _forward_model(self, *args, **kwargs)

        heir.forward = forward
    return heir


def _parameters(function):
    """Names of the parameters after self that may be given by place."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds]
    return tuple(named[1:])


def _arguments(module, args, kwargs):
    """{name: value} of a call of forward; None where it is none."""
    names = module.parameters_by_place
    if len(args) > len(names) or any(name in kwargs for name in names[: len(args)]):
        return None
    return dict(zip(names, args, strict=False)) | kwargs


def _forward_model(self, *args, **kwargs):
    original = self.inherited.forward
    arguments = _arguments(self, args, kwargs)
    if arguments is None or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return original(self, *args, **kwargs)
    mask = arguments.pop("attention_mask", None)
    options = arguments | {"output_attentions": arguments.get(
        "output_attentions", getattr(self.config, "output_attentions", False)
    )}  # fmt: skip

    def leave(reason):
        if not torch.compiler.is_compiling():
            warn_once(type(self).__name__, reason)
        return original(self, *args, **kwargs)

    reason = why_not_this_call(self.config, mask, options)
    if reason := reason or why_not_this_state(self, *self._bert_fast):
        return leave(reason)
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        return original(self, *args, **kwargs)  # which says what is wrong
    like = ids if embeds is None else embeds
    packing = packing_of(mask, like.shape[:2], like.device)
    if self._bert_fast[0].position_bias and (reason := _why_no_distances(packing)):
        return leave(reason)
    as_dict = arguments.pop("return_dict", None)
    as_dict = getattr(self.config, "return_dict", True) if as_dict is None else as_dict
    # No mask: nothing is left to hide. A dictionary: hidden states are found by their name.
    run = functools.partial(original, self, **arguments, return_dict=True)
    one_call = getattr(self, self._bert_fast[0].encoder)._bert_fast[-1]
    if torch.compiler.is_compiling() or not one_call.is_bound():
        out = _run_with(run, packing, kept_of(self), None)
    else:
        numbers = like.shape[0] * like.shape[1] * self.config.hidden_size
        with contextlib.ExitStack() as around:  # until layers run one by one
            around.enter_context(one_call.around(numbers))
            out = _run_with(run, packing, kept_of(self), around)
    hidden_states = getattr(out, "hidden_states", None)
    if hidden_states is not None:  # transformers 5 records what the layers give: packed
        out.hidden_states = tuple(
            packing.unpack(h).to(out.last_hidden_state.dtype)
            if h is not None and h.ndim == 2 else h
            for h in hidden_states
        )  # fmt: skip
    return out if as_dict else out.to_tuple()


def _run_with(run, *handed):
    token = _hand_over(handed)
    try:
        return run()
    finally:
        _take_back(token)


def _why_no_distances(packing):
    """Why the distance of two packed tokens may not be that of their columns, or None."""
    if torch.compiler.is_compiling() or packing.padded_tail:
        return "a mask whose holes cannot be looked for"
    if packing.index is not None and (tokens := len(packing.index)) > 1:
        ends, lengths = packing.cu_seqlens.clamp(max=tokens - 1), packing.cu_seqlens.diff()
        last = packing.index[(packing.cu_seqlens[1:] - 1).clamp(min=0)]
        columns = last - packing.index[ends[:-1]] + 1  # from the first to the last
        if not bool(((columns == lengths) | (lengths == 0)).all()):
            return "a mask with holes"
    return None


def packing_of(mask, shape, device):
    if mask is None:
        return Packing.of_full(*shape, device)
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"attention_mask must have the input's shape {tuple(shape)}, "
                         f"not {tuple(mask.shape)}")  # fmt: skip
    return Packing.of_mask(mask.bool()).to(device)


class _Model(_Accelerated):
    """Takes ids and mask."""


class _Encoder(_Accelerated):
    """Loops over layers, on packed tokens."""

    def _apply(self, *args, **kwargs):
        self._bert_fast[-1].forget()  # of weights that may go
        return super()._apply(*args, **kwargs)

    def forward(self, *args, **kwargs):
        handed = _handed_over()
        if handed is None:  # called by others than its model
            return super().forward(*args, **kwargs)
        packing, parts, around = handed
        output, workspace, bias_of, one_call = self._bert_fast
        arguments = _arguments(self, args, kwargs)
        hidden_states = arguments[self.parameters_by_place[0]]
        recorded = bool(arguments.get("output_hidden_states"))
        x = packing.pack(hidden_states)
        # A layer writes over what it has read, if nobody else may look at that.
        memory = can_reuse_memory(x)
        seen = memory and (recorded or any(map(is_watched, self.layer)))
        reuse = memory and not seen
        if reuse and packing.index is None:
            x = x.clone()
        bias = None
        if bias_of is not None:
            bias = getattr(self, bias_of)(x.new_empty(1, packing.max_seqlen, 1))[0]
        where = whereabouts(x, is_captured(x.device)) if product_adds_bias(x) else None
        works_in = (Kept(workspace) if seen else workspace) if memory else NoWorkspace()
        run = _Run(packing, works_in, bias, parts, where)
        last, states = None, []
        if reuse and bias is None:
            state = [layer._bert_fast.state for layer in self.layer]
            last = one_call(self.layer, x, packing, workspace, run.describe, state)
        if last is None:
            if around is not None:
                around.close()  # torch's own ops are to run in all threads
            layers = Layers(describe, self.layer, x, packing)
            for layer in self.layer:
                if recorded:
                    states.append(as_autocast_gives(packing.unpack(x), hidden_states))
                x = layers(layer, x, run)
        x = as_autocast_gives(packing.unpack(x), hidden_states)
        out = output(x, hidden_states=(*states, x)) if recorded else output_of(output, x)
        return out if arguments.get("return_dict", True) else out.to_tuple()


class _LayerSettings:
    """What the config says of a layer, and its packed weights."""

    def __init__(self, config, family):
        self.family = family
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.approximate = GELU_APPROXIMATE[getattr(config, family.activation)]
        self.packed, self.how = {}, {}  # how: each product's precision and factors
        self.prepacked = False
        self.changed()

    def changed(self):
        """What was made of the layer's parameters is made anew."""
        self.state = object()

    def prepack(self, layer):
        for path in self.family.linears():
            linear = layer.get_submodule(path)
            if is_plain(linear):
                self.packed[path] = ops.pack_weight(linear.weight, *self.how.get(path, ()))
        self.prepacked = True
        self.changed()


class _Layer(_Accelerated):
    """One layer, on packed tokens."""

    def prepack(self):
        self._bert_fast.prepack(self)

    def _apply(self, *args, **kwargs):
        module = super()._apply(*args, **kwargs)
        self._bert_fast.changed()
        if self._bert_fast.packed:  # through .data, which nobody could see
            self.prepack()
        return module

    def train(self, mode=True):
        if mode is not self.training:  # weights are exchanged between training and use
            self._bert_fast.changed()
        return super().train(mode)

    def forward(self, x, *args, **kwargs):
        if not args or not isinstance(args[0], _Run):
            return super().forward(x, *args, **kwargs)
        run, settings = args[0], self._bert_fast
        packing, workspace, parts = run.packing, run.workspace, run.parts_of(self)
        q, k, v, out, up, down = parts.products(settings)
        tokens, width = x.shape[0], q.out_features
        heads = width // settings.head_dim, settings.head_dim
        context = workspace.take("hidden", tokens, width, x)
        options = dict(
            max_seqlen=packing.max_seqlen, dropout_p=probability(parts.attention_dropout),
            padded_tail=packing.padded_tail, position_bias=run.position_bias,
            out=None if context is None else context.view(tokens, *heads),
        )  # fmt: skip
        if (fused := parts.fused(x, run.where, settings.prepacked)) is not None:
            context = ops.attention_qkv(
                fused.view(tokens, 3, *heads), packing.cu_seqlens, **options
            )
        else:
            linears = [
                (linear, workspace.take(name, tokens, width, x))
                for name, linear in (("q", q), ("k", k), ("v", v))
            ]
            projected, biases = zip(
                *(linear.project(x, out, workspace) for linear, out in linears), strict=True
            )
            context = ops.attention(
                *(p.view(tokens, *heads) for p in projected), packing.cu_seqlens,
                bias=_stacked(biases, heads), **options,
                precision=attention_precision(x, linears, options["dropout_p"]),
            )  # fmt: skip
        x = project_add_norm(
            context.view(tokens, width), out, parts.attention_norm, x,
            probability(parts.out_dropout), workspace,
        )  # fmt: skip
        return feed_forward(
            x, up, down, parts.norm, settings.approximate, probability(parts.down_dropout),
            workspace,
        )  # fmt: skip


def _stacked(biases, heads):
    """The biases of q, k and v, as attention adds them; those that were added already are zero."""
    given = next((bias for bias in biases if bias is not None), None)
    if given is None:
        return None
    zero = None if all(bias is not None for bias in biases) else torch.zeros_like(given)
    return torch.stack([zero if bias is None else bias for bias in biases]).view(3, *heads)
