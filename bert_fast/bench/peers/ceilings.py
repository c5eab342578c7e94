"""What bounds a work on this machine: the copies and matrix products that it must do."""

import functools

import torch

from bert_fast import ops
from bert_fast.bench.contestant import Run
from bert_fast.bench.peers.ours import can_prepack
from bert_fast.bench.peers.peer import Peer
from bert_fast.models.workspace import Workspace


class Copy(Peer):
    """Moves as many bytes as the work must (read + written), by one tensor copy."""

    name, ceiling = "copy, as many bytes", True

    def _run(self, work, inputs):
        source = torch.empty(work.num_bytes // 2, dtype=torch.uint8, device=work.device)
        target = torch.zeros_like(source.fill_(1))
        return Run(lambda: target.copy_(source))

    attention = layer_norm = gelu = linear_gelu = _run


class Gemms(Peer):
    """The work's matrix products alone, on real tokens, into memory that is there already:
    torch.mm (MKL or oneDNN; cuBLAS), or our packed linear."""

    ceiling = True

    def __init__(self, packed=False):
        self.packed = packed
        self.name = "GEMMs alone" + (", packed" if packed else "")
        if packed:
            self.devices, self.dtypes, self.inference = ("cpu",), (torch.float32,), True

    def why_absent(self, work):
        if self.packed and not can_prepack():
            return "nothing would be prepacked here"
        return super().why_absent(work)

    def attention(self, work, inputs):
        """As many FLOPs in one product of a shape that suits the machine."""

        def whole(size):  # tensor cores want rows of whole 16 bytes
            return 64 * max(1, round(size / 64))

        side = whole((work.flops / 2) ** (1 / 3))
        return self._products(work, [(side, whole(work.flops / (2 * side * side)), side)])

    def linear_gelu(self, work, inputs):
        shape = work.rows, work.width, work.out_width
        return self._products(work, [shape], work.backward, forward=not work.backward)

    def model(self, work, inputs, forward=True):
        config = work.config
        hidden, wide = config.hidden_size, config.intermediate_size
        shapes = [(3 * hidden, hidden), (hidden, hidden), (wide, hidden), (hidden, wide)]
        shapes = [(sum(b), i, o) for b in work.batches for o, i in shapes]
        return self._products(work, shapes, work.backward, forward, times=config.num_hidden_layers)

    train = model

    def layer(self, work, inputs):
        return self.model(work, inputs, forward=not work.backward)

    def _products(self, work, shapes, backward=False, forward=True, times=1):
        options = dict(device=work.device, dtype=work.dtype)
        calls, workspace = [], Workspace()
        for rows, i, o in shapes:
            x, weight = torch.randn(rows, i, **options), torch.randn(o, i, **options)
            # Not empty: leftover bits may be denormals, on which a product takes 100 times as long.
            out = torch.randn(rows, o, **options)
            if self.packed:
                weight = torch.nn.Parameter(weight)
                pack = ops.pack_weight(weight)
                calls.append(functools.partial(pack.forward, x, weight, None, None, out, workspace))
                continue
            if forward:
                calls.append(functools.partial(torch.mm, x, weight.t(), out=out))
            if backward:  # dx = dout W, dW = doutᵀ x
                dx, dweight = torch.empty_like(x), torch.empty_like(weight)
                calls.append(functools.partial(torch.mm, out, weight, out=dx))
                calls.append(functools.partial(torch.mm, out.t(), x, out=dweight))

        def run():
            for _ in range(times):
                for call in calls:
                    call()

        return Run(run)
