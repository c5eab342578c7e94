"""``for_inference("float8")``, experimental: products of float8 rows on a GPU, where layer-norm and
GELU write the rows that the next product reads beside, or in the place of, their result.

All else stays as it is in bfloat16: embeddings, attention, layer-norm's statistics (float32) and
what is added up from layer to layer, the pooler, heads.
"""

import torch
from torch import Tensor

from bert_fast import ops
from bert_fast.models.blocks import Linear, two
from bert_fast.models.workspace import NoWorkspace

SINCE = 8, 9  # the compute capability that has e4m3
STEP = 16  # torch's scaled product takes widths that are multiples of it
emulated = False  # of tests alone: on a CPU, too, where products are computed by their definition


class Float8Linear(Linear):
    """A linear layer after ``for_inference("float8")``. What it multiplies are rows, or what
    becomes rows here: attention's result, whose scale would be over all heads, which no program of
    attention sees, and what a hook has put in the place of a result."""

    def product(self, x, bias=None):
        if type(x) is ops.Rounded:
            x = x.rows
        return self.packed.product(ops.float8(x) if isinstance(x, Tensor) else x, bias)

    def project(self, x, out, workspace):
        return self.product(x, two(self)[1]), None

    def matmul(self, x, out, workspace):
        return self.product(x)

    def gelu(self, x, approximate, out, workspace):
        return ops.gelu_float8(self.product(x), two(self)[1], approximate)

    def forward(self, x):
        rows = x.reshape(-1, self.in_features)
        return self.product(rows, two(self)[1]).view(*x.shape[:-1], self.out_features)


class Float8Layers:
    """The layers of one forward, called one by one, as :class:`~bert_fast.models.repeat.Layers`
    calls them: a layer gives its result and its rows, which the next one is given."""

    def __init__(self, describe, layers, x, packing):
        if layers.training:
            raise RuntimeError("for_inference('float8') is for inference: call eval() first")
        self.latest = None

    def __call__(self, layer, x, packing, workspace):
        given = self.latest
        if given is None or given.value is not x:  # the embeddings', whose kernel gives no rows
            given = ops.Rounded(x, ops.float8(x))
        out = layer(given, packing, NoWorkspace())
        self.latest = out if type(out) is ops.Rounded else None
        return out if self.latest is None else out.value


def check(model):
    """Raises a ValueError that names what of a BertModel does not fit."""
    device = model.embeddings.word.weight.device
    on_gpu = device.type == "cuda" and torch.version.cuda is not None
    if not (emulated or (on_gpu and torch.cuda.get_device_capability(device) >= SINCE)):
        raise ValueError(
            "dtype 'float8' is for a GPU of compute capability 8.9 or later, not for "
            + (torch.cuda.get_device_name(device) if on_gpu else str(device))
        )
    if others := {p.dtype for p in model.parameters()} - {torch.bfloat16}:
        raise ValueError(
            f"dtype 'float8' is for models in bfloat16, not in {others.pop()}: call bfloat16()"
        )
    for name in ("hidden_size", "intermediate_size"):
        if (size := getattr(model.config, name)) % STEP:
            raise ValueError(
                f"dtype 'float8' is for sizes that are multiples of {STEP}: {name} is {size}"
            )


@torch.no_grad()
def pack(products):
    """Gives products, (name, product), their weights in float8: all of them or none."""
    packed = [ops.Float8Weight(product.weight) for _, product in products]
    for (_, product), weight in zip(products, packed, strict=True):
        try:
            # Whether torch has this product on this device, only torch knows.
            weight.product(ops.float8(product.weight[:STEP]), product.bias)
        except (AttributeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"dtype 'float8': torch {torch.__version__} cannot multiply by row on "
                f"{product.weight.device}: {error}"
            ) from error
    for (_, product), weight in zip(products, packed, strict=True):
        product.packed, product.__class__ = weight, Float8Linear
