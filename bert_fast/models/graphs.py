"""CUDA graphs for latency: a small batch takes longer to launch than to compute, unless all of its
launches are one replay."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from bert_fast.models.config import BertConfig


def cudagraph(model: nn.Module, *, max_graphs: int = 32) -> CudaGraphs:
    """A callable that runs a model of ours by replaying CUDA graphs, for inference.

    Batch, length and number of real tokens are rounded up to buckets (1, 2, 3, 4, 6, 8, 12, ...:
    at most a third of the tokens is in vain), and each combination is captured once, by its first
    call. Padding is dropped inside the graph. Weights may change in place; a parameter that is
    replaced by another is not seen.

    Args:
        model: :class:`bert_fast.BertModel` or one of the task heads, in eval mode on a CUDA device.
        max_graphs: captured graphs that are kept, the latest used; each holds its activations.

    Returns:
        ``run(input_ids, attention_mask=None, token_type_ids=None)``, of (batch, seqlen) tensors on
        any device, which gives what ``model`` gives. Best with the mask on the CPU, where its
        tokens are counted; a mask on a GPU is not waited for, and counted as full.

    Raises:
        TypeError, ValueError: naming what does not fit.
    """
    return CudaGraphs(model, max_graphs)


def bucket(number):
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is no smaller."""
    if number <= 2:
        return max(number, 1)
    power = 1 << (number - 1).bit_length()  # the next power of two
    return power * 3 // 4 if number <= power * 3 // 4 else power


class CudaGraphs:
    """See :func:`cudagraph`. ``captured`` counts the graphs that were made."""

    def __init__(self, model, max_graphs=32, capture=None):
        if not isinstance(getattr(model, "config", None), BertConfig):
            raise TypeError(f"model must be one of bert_fast's, not {type(model).__name__}")
        if max_graphs < 1:
            raise ValueError(f"max_graphs must be at least 1, not {max_graphs}")
        self.device = next(model.parameters()).device
        if capture is None:
            if self.device.type != "cuda":
                raise ValueError(f"model must be on a CUDA device, not on {self.device}")
            capture = _Capture()
        self.model, self.max_graphs, self.capture = model, max_graphs, capture
        self.graphs, self.captured, self.seqlen_dims = OrderedDict(), 0, None

    @torch.inference_mode()
    def __call__(self, input_ids, attention_mask=None, token_type_ids=None):
        if self.model.training:
            raise RuntimeError("cudagraph is for inference: call eval() first")
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError("input_ids must be a (batch, seqlen) tensor that is not empty")
        for name, value in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(f"{name} must have input_ids' shape {tuple(input_ids.shape)}, "
                                 f"not {tuple(value.shape)}")  # fmt: skip
        (batch, seqlen), config = input_ids.shape, self.model.config
        if seqlen > config.max_position_embeddings:
            raise ValueError(f"input_ids hold {seqlen} tokens a sequence; the model has "
                             f"{config.max_position_embeddings} positions")  # fmt: skip
        if self.seqlen_dims is None:
            self.seqlen_dims = self._find_seqlen_dims()
        rows, columns = bucket(batch), min(bucket(seqlen), config.max_position_embeddings)
        tokens = batch * seqlen
        if attention_mask is not None and attention_mask.device.type == "cpu":
            real = attention_mask.bool()
            if not torch.equal(attention_mask, real.to(attention_mask.dtype)):
                raise ValueError("attention_mask must hold ones and zeros alone")
            tokens = int(real.sum())
        graph = self._graph(rows, columns, min(bucket(tokens), rows * columns))
        graph.inputs.zero_()
        place = graph.inputs[:, :batch, :seqlen]
        for i, value in enumerate((input_ids, token_type_ids, attention_mask)):
            if value is not None:
                place[i].copy_(value, non_blocking=True)
        if attention_mask is None:
            place[2].fill_(1)
        graph.replay()
        found = (
            self._cut(value, dims, batch, seqlen)
            for value, dims in zip(graph.outputs, self.seqlen_dims, strict=True)
        )
        return type(graph.outputs)(*found)

    def _graph(self, rows, columns, capacity):
        """The graph of a bucket, captured if need be."""
        key = rows, columns, capacity
        if key not in self.graphs:
            while len(self.graphs) >= self.max_graphs:
                self.graphs.popitem(last=False)
            # One real token, lest the first run has none.
            inputs = torch.zeros(3, rows, columns, dtype=torch.int64, device=self.device)
            inputs[2, 0, 0] = 1

            def run():
                ids, types, mask = inputs
                return self.model(ids, mask, types, capacity=capacity)

            self.graphs[key] = _Graph(inputs, *self.capture(run))
            self.captured += 1
        self.graphs.move_to_end(key)
        return self.graphs[key]

    def _find_seqlen_dims(self):
        """For each of the model's results, which dimensions follow the sequence's length."""
        short, long = (
            self.model(torch.zeros(1, n, dtype=torch.int64, device=self.device)) for n in (1, 2)
        )
        return [
            None if a is None else [i for i in range(a.ndim) if a.shape[i] != b.shape[i]]
            for a, b in zip(short, long, strict=True)
        ]

    @staticmethod
    def _cut(value, dims, batch, seqlen):
        """A copy, for the next replay writes here, without the bucket's surplus."""
        if value is None:
            return None
        value = value[:batch]
        for dim in dims:
            value = value.narrow(dim, 0, seqlen)
        return value.clone()


class _Graph:
    def __init__(self, inputs, replay, outputs):
        self.inputs, self.replay, self.outputs = inputs, replay, outputs


class _Capture:
    """Captures a function; all graphs share their memory, for one runs at a time."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels, which capture must not
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = function()
        return graph.replay, outputs
