"""CUDA graphs for latency: a small batch takes longer to launch than to compute, unless all of its
launches are one replay."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from bert_fast.devices import own_workspaces
from bert_fast.models.config import BertConfig
from bert_fast.models.packing import check_mask, count, fixed_rows, is_on_host, look_at
from bert_fast.models.staging import Inputs
from bert_fast.models.watch import Watch

# Calls after which what was used before counts half: what is no longer used soon makes way. Not
# measured on a GPU; of 95 buckets drawn at random it leaves less than a capture in 100 calls.
HALVED_AFTER = 4096


def cudagraph(model: nn.Module, *, max_graphs: int = 32) -> Any:
    """A callable that runs a model by replaying CUDA graphs, for inference.

    Batch, length and number of real tokens are rounded up to buckets (1, 2, 3, 4, 6, 8, 12, ...:
    at most a third of the tokens is in vain; above 1,024 tokens eight to each power of two: at most
    an eighth), and each combination is captured once, by its first call, which takes about as long
    as four calls. Where there are more combinations than
    ``max_graphs``, the least used graph makes way for one used as often, and once as many have made
    way as are kept, more often; what makes way counts from nothing again: so captures become rare,
    and the model is called for the rest. Padding is dropped inside the graph. Weights may change in
    place; where a parameter or a module is replaced, all graphs are captured anew. A model with
    hooks, or with modules that are neither torch's nor transformers' (an adapter of peft, a class
    of your own), which may keep anywhere what they go by, is called, without graphs.

    Args:
        model: in eval mode on a CUDA device: :class:`bert_fast.BertModel`, one of the task heads, a
            model of transformers after :func:`bert_fast.accelerate` (but MPNet), or what holds one:
            a SentenceTransformer, a CrossEncoder.
        max_graphs: captured graphs that are kept, the most used (uses count half after every
            4,096 calls); each holds its inputs and results, and all share the memory in between.

    Returns:
        ``run(input_ids, attention_mask=None, token_type_ids=None)``, of (batch, seqlen) tensors on
        any device, which gives what ``model`` gives, in tensors of the caller's own. Best with all
        of them on the CPU, as a tokenizer makes them: one transfer. The real tokens of a mask on a
        GPU are counted there, and their number is waited for. Several threads may call it: one
        after the other. Of a SentenceTransformer or CrossEncoder: a copy that shares its weights,
        whose ``encode`` or ``predict`` replays graphs where it is called without gradients.

    Raises:
        TypeError, ValueError: naming what does not fit.
        RuntimeError: in a call: the model is in training, or cannot be captured.
    """
    if _is_ours(model) or _is_accelerated(model):
        return CudaGraphs(model, max_graphs)
    if (inner := _accelerated_inside(model)) is not None:
        return _with(model, inner, Graphed(inner, CudaGraphs(inner, max_graphs)))
    raise _unfit(model)


@functools.lru_cache(4096)
def bucket(number):
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is no smaller."""
    if number <= 2:
        return max(number, 1)
    power = 1 << (number - 1).bit_length()  # the next power of two
    return power * 3 // 4 if number <= power * 3 // 4 else power


@functools.lru_cache(4096)
def token_bucket(number):
    """The same for real tokens, in finer steps above 1,024, where a GPU's time goes by them."""
    if number <= 1024:
        return bucket(number)
    step = (1 << (number - 1).bit_length()) // 16  # an eighth of the power of two below
    return -(-number // step) * step


def positions(model):
    """The longest input of a model of any family, in tokens."""
    longest, pad = model.config.max_position_embeddings, model.config.pad_token_id
    embeddings = getattr(getattr(model, "base_model", None), "embeddings", None)
    # RoBERTa's first position is the one after the padding's.
    counts_from_padding = getattr(embeddings, "padding_idx", None) == pad and pad is not None
    return longest - (pad + 1 if counts_from_padding else 0)


class CaptureError(RuntimeError):
    """CUDA cannot capture what a model does, or has no memory left for it."""


class MovedError(ValueError):
    """A model is on another device than its graphs."""


class CudaGraphs:
    """See :func:`cudagraph`. ``captured`` counts the graphs that were made.

    Args:
        capture: in the place of CUDA's: of a function that gives a list of tensors, (a function
            that fills them again, the list).
        capture_at: the use of a bucket that captures it; the ones before run the model.
    """

    def __init__(self, model, max_graphs=32, capture=None, capture_at=1):
        self.ours = _is_ours(model)
        if not self.ours and not _is_accelerated(model):
            raise _unfit(model)
        if max_graphs < 1:
            raise ValueError(f"max_graphs must be at least 1, not {max_graphs}")
        self.device = next(model.parameters()).device
        if capture is None:
            if self.device.type != "cuda":
                raise ValueError(f"model must be on a CUDA device, not on {self.device}")
            capture = _Capture()
        self.model, self.max_graphs, self.capture = model, max_graphs, capture
        self.capture_at, self.longest = capture_at, positions(model)
        self.pad = getattr(model.config, "pad_token_id", None) or 0
        takes_types = self.ours or "token_type_ids" in inspect.signature(model.forward).parameters
        self.takes_types = takes_types
        self._start()

    def __getstate__(self):
        """A copy, or what another process loads, captures graphs of its own model."""
        made = "graphs", "uses", "watch", "form", "lock", "last", "guard"
        return {k: v for k, v in self.__dict__.items() if k not in made}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()

    def _start(self):
        self.graphs, self.captured, self.uses, self.calls = OrderedDict(), 0, OrderedDict(), 0
        self.made_way = 0  # graphs for others
        self.watch = self.form = None  # the model when the graphs were captured; its results
        self.lock, self.last = threading.Lock(), None  # the last turn's stream and end
        on_gpu = self.device.type == "cuda"
        self.guard = torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext()

    def __call__(self, input_ids, attention_mask=None, token_type_ids=None):
        found = self.replayed(input_ids, attention_mask, token_type_ids)
        if found is None:
            with torch.no_grad():
                return self._directly(input_ids, token_type_ids, attention_mask)
        return found

    def replayed(self, input_ids, attention_mask=None, token_type_ids=None):
        """The same by a graph; None where there is none for these inputs, or not yet."""
        self._check(input_ids, attention_mask, token_type_ids)
        inputs = input_ids, token_type_ids, attention_mask
        (batch, seqlen), tokens = input_ids.shape, input_ids.numel()
        if attention_mask is not None:
            tokens = _count(attention_mask)
        rows, columns = bucket(batch), min(bucket(seqlen), self.longest)
        key = rows, columns, min(token_bucket(tokens), rows * columns), self._autocast()
        with self.lock, self.guard:
            return self._replayed(key, inputs, batch, seqlen, tokens)

    def _replayed(self, key, inputs, batch, seqlen, tokens):
        graph = stream = None
        try:
            with torch.inference_mode():
                stream, graph = self._stream(), self._graph(key)
                if graph is None:
                    return None
                graph.inputs.fill(inputs, batch, seqlen)
                graph.replay()
            with _ordinary():
                return self._found(graph.outputs, batch, seqlen, tokens)
        finally:
            if graph is not None and stream is not None:
                self.last = stream.cuda_stream, graph.inputs.end(stream)

    def _check(self, input_ids, attention_mask, token_type_ids):
        if self.model.training:
            raise RuntimeError("cudagraph is for inference: call eval() first")
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError("input_ids must be a (batch, seqlen) tensor that is not empty")
        for name, value in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(f"{name} must have input_ids' shape {tuple(input_ids.shape)}, "
                                 f"not {tuple(value.shape)}")  # fmt: skip
        if token_type_ids is not None and not self.takes_types:
            raise TypeError(f"{type(self.model).__name__} takes no token_type_ids")
        if input_ids.shape[1] > self.longest:
            raise ValueError(
                f"input_ids hold {input_ids.shape[1]} tokens a sequence; the model has "
                f"{self.longest} positions"
            )

    def _autocast(self):
        device = self.device.type
        on = torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if on else None

    def _stream(self):
        """The current one, after what another has left to do in the graphs' memory."""
        if self.device.type != "cuda":
            return None
        stream = torch.cuda.current_stream()
        if self.last is not None and self.last[0] != stream.cuda_stream:
            stream.wait_event(self.last[1])
        return stream

    def _graph(self, key):
        """The graph of a bucket, captured if it is time to; None: the model is to be called."""
        if self.watch is None or not self.watch.is_as_it_was():
            self.graphs.clear()
            self.uses.clear()
            if (device := next(self.model.parameters()).device) != self.device:
                raise MovedError(f"model has moved to {device}: make a new cudagraph there")
            self.watch, self.form = Watch(self.model), None
        if self.watch.is_looked_into():
            return None
        self._count_use(key)
        if key not in self.graphs:
            if self.uses[key] < self.capture_at or not self._has_room_for(key):
                return None
            if self.form is None:
                self.form = self._find_form()
            self.graphs[key] = self._captured(*key[:3])
            self.captured += 1
        self.graphs.move_to_end(key)
        return self.graphs[key]

    def _count_use(self, key):
        self.calls += 1
        if self.calls % HALVED_AFTER == 0:
            self.uses = OrderedDict((k, n // 2) for k, n in self.uses.items() if n > 1)
        self.uses[key] = self.uses.pop(key, 0) + 1
        while len(self.uses) > 1024:
            self.uses.popitem(last=False)

    def _has_room_for(self, key):
        """Whether fewer graphs are kept than may be, or the least used one makes way; of several
        the one used longest ago."""
        if len(self.graphs) >= self.max_graphs:
            least = min(self.graphs, key=lambda kept: self.uses.get(kept, 0))
            if self.uses[key] < self.uses.get(least, 0) + (self.made_way >= self.max_graphs):
                return False
            del self.graphs[least]
            self.uses.pop(least, None)
            self.made_way += 1
        return True

    def _captured(self, rows, columns, capacity):
        # One real token, lest the first run has none.
        inputs = torch.zeros(3, rows, columns, dtype=torch.int64, device=self.device)
        inputs[2, 0, 0] = 1

        def run():
            leaves, _ = tree_flatten(self._compute(*inputs, capacity))
            return [leaf for leaf in leaves if leaf is not None]

        cached = torch.is_autocast_cache_enabled()
        # A graph must not read autocast's copies of the weights, which are gone with its context.
        torch.set_autocast_cache_enabled(False)
        try:
            return _Graph(Inputs(inputs, self.pad), *self.capture(run))
        except Exception as error:
            name = type(self.model).__name__
            raise CaptureError(f"cudagraph cannot capture {name}: {error}") from error
        finally:
            torch.set_autocast_cache_enabled(cached)

    def _compute(self, ids, types, mask, capacity):
        if self.ours:
            return self.model(ids, mask, types, capacity=capacity)
        with fixed_rows(capacity):
            return self._theirs(ids, types, mask)

    def _theirs(self, ids, types, mask):
        given = {"token_type_ids": types} if self.takes_types and types is not None else {}
        return self.model(input_ids=ids, attention_mask=mask, **given)

    def _directly(self, ids, types, mask):
        ids, types = (t if t is None else t.to(self.device) for t in (ids, types))
        if self.ours:
            return self.model(ids, mask, types)
        return self._theirs(ids, types, mask)

    def _find_form(self):
        """How the model's results are made of tensors (or None); and of each tensor, which
        dimensions follow the sequence's length."""
        with contextlib.nullcontext() if self.ours else fixed_rows(2):  # keeps no copies
            (short, form), (long, _) = (
                tree_flatten(self._directly(torch.zeros(1, n, dtype=torch.int64), None, None))
                for n in (1, 2)
            )
        return form, [
            None if a is None else [i for i in range(a.ndim) if a.shape[i] != b.shape[i]]
            for a, b in zip(short, long, strict=True)
        ]

    def _found(self, outputs, batch, seqlen, tokens):
        """Copies, for the next replay writes here, without the bucket's surplus."""
        form, every = self.form
        outputs = iter(outputs)
        return tree_unflatten(
            [None if dims is None else _cut(next(outputs), dims, batch, seqlen) for dims in every],
            form,
        )


class PackedGraphs(CudaGraphs):
    """Of a BertModel: its last hidden states alone, packed, (total_tokens, hidden)."""

    def _compute(self, ids, types, mask, capacity):
        return self.model.encode(ids, mask, types, capacity=capacity)[0][-1]

    def _directly(self, ids, types, mask):
        ids, types = (t if t is None else t.to(self.device) for t in (ids, types))
        return self.model.encode(ids, mask, types)[0][-1]

    def _find_form(self):
        return ()

    def _found(self, outputs, batch, seqlen, tokens):
        return outputs[0][:tokens].clone()


def _cut(value, dims, batch, seqlen):
    shape = list(value.shape)
    shape[0] = batch
    for dim in dims:
        shape[dim] = seqlen
    if shape != list(value.shape):
        value = value.as_strided(shape, value.stride())
    return value.clone()


def _ordinary():
    """A context whose tensors are no inference tensors: a head may learn from them."""
    is_on = torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if is_on else contextlib.nullcontext()


def _count(mask):
    """The number of real tokens."""
    check_mask(mask)
    if not is_on_host(mask):
        return look_at(mask)[2]
    return count(mask)


def _is_ours(model):
    return isinstance(getattr(model, "config", None), BertConfig)


def _is_accelerated(model):
    """Whether it is a model of transformers, with or without a head, that was accelerated."""
    if not hasattr(type(model), "base_model_prefix"):
        return False
    bases = [m for m in (model, getattr(model, "base_model", None)) if isinstance(m, nn.Module)]
    found = [m.__dict__["_bert_fast"] for m in bases if "_bert_fast" in m.__dict__]
    # Relative positions are those of columns, which a packed buffer of fixed size does not know.
    return bool(found) and not getattr(found[0][0], "position_bias", None)


def _accelerated_inside(model):
    if not isinstance(model, nn.Module):
        return None
    return next((m for m in model.modules() if m is not model and _is_accelerated(m)), None)


def _unfit(model):
    return TypeError(
        f"model must be one of bert_fast's, not {type(model).__name__}; or one of transformers' "
        "after bert_fast.accelerate (but MPNet)"
    )


def _with(module, old, new):
    """A copy of a module, with the same weights, that has ``new`` in the place of ``old``."""
    if module is old:
        return new
    made = copy.copy(module)
    made.__dict__["_modules"] = type(module._modules)(
        (name, child if child is None else _with(child, old, new))
        for name, child in module._modules.items()
    )
    return made


class Graphed(nn.Module):
    """Stands in a model's place: calls in inference that ask for nothing else are replayed."""

    def __init__(self, model, run):
        super().__init__()
        self.model, self.__dict__["run"] = model, run

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, **options):
        plain = all(v is None or (k, v) == ("return_dict", True) for k, v in options.items())
        model = self._modules["model"]
        if plain and input_ids is not None and not (torch.is_grad_enabled() or model.training):
            with contextlib.suppress(MovedError):
                return self.run(input_ids, attention_mask, token_type_ids)
        given = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return model(input_ids=input_ids, attention_mask=attention_mask, **given, **options)


class _Graph:
    def __init__(self, inputs, replay, outputs):
        self.inputs, self.replay, self.outputs = inputs, replay, outputs


class _Capture:
    """Captures a function; all graphs share their memory, for one runs at a time."""

    pool = None

    def __reduce__(self):  # memory is not copied
        return type(self), ()

    def __call__(self, function):
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels, which capture must not
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        captured = torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local")
        with own_workspaces(), captured:
            outputs = function()
        return graph.replay, outputs
