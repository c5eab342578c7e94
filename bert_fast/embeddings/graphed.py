"""Small batches on a GPU by CUDA graphs: packed inputs in, what the backbone gives out."""

import warnings

import torch

from bert_fast.embeddings.backbone import padded
from bert_fast.models.bert import BertModel
from bert_fast.models.graphs import CaptureError, CudaGraphs, PackedGraphs

# Above it the GPU takes as long as the host for the launches, and a bucket's surplus costs more
# than they do. Not measured; on an H100, MiniLM in bf16, 10,600 tokens of a padded batch still took
# 1.4 ms by a graph and 5.5 without.
MOST_TOKENS = 4096
# A text of a size that comes once pays for no capture: a bucket is captured at its second use.
CAPTURE_AT = 2


class GraphedBackbone:
    """The graphs of a backbone's model; none where it cannot have them."""

    def __init__(self, backbone, capture=None):
        model = self.model = backbone.model
        self.device = next(model.parameters()).device
        kind = PackedGraphs if isinstance(model, BertModel) else CudaGraphs
        try:
            self.run = kind(model, capture=capture, capture_at=CAPTURE_AT)
        except TypeError:  # a family without
            self.run = None

    def is_of(self, backbone, device):
        return self.model is backbone.model and self.device == device

    def __call__(self, tokens, types, cu_seqlens, longest):
        """The backbone's result for packed inputs, all on the CPU: on the device; or None, where it
        is to be called."""
        run = self.run  # once: another thread may drop it
        if run is None or (len(cu_seqlens) - 1) * longest > 2 * MOST_TOKENS:
            return None
        if not 0 < len(tokens) <= MOST_TOKENS:
            return None
        types = types if run.takes_types else None
        ids, types, mask = padded(tokens, types, cu_seqlens, longest, run.pad)
        try:
            found = run.replayed(ids, mask, types)
        except CaptureError as error:
            warnings.warn(f"without CUDA graphs from now on: {error}", stacklevel=2)
            self.run = None
            return None
        if found is None or isinstance(found, torch.Tensor):
            return found
        if hasattr(found, "logits"):
            return found.logits
        index = mask.reshape(-1).nonzero().squeeze(1)
        index = (index.pin_memory() if self.device.type == "cuda" else index).to(
            self.device, non_blocking=True
        )
        return found.last_hidden_state.flatten(0, 1).index_select(0, index)
