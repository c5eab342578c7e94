"""What every encoder layer here is made of, whoever keeps its weights: packed activations in and
out, biases left to the kernel that reads the result next, memory reused where it may be."""

import torch
import torch.nn.functional as F
from torch import nn

from bert_fast import ops
from bert_fast.models.workspace import Fresh, can_reuse_memory

# transformers' activations that are GELU, and which of the two; the others are refused by name.
GELU_APPROXIMATE = {
    "gelu": "none", "gelu_python": "none",
    "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_accurate": "tanh", "gelu_pytorch_tanh": "tanh",
    "gelu_python_tanh": "tanh",
}  # fmt: skip


def exportable(kind):
    """Registers a named tuple: a program of ``torch.export`` that returns it can then be saved."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    torch.utils._pytree._register_namedtuple(kind, serialized_type_name=name)
    return kind


def product_adds_bias(x):
    """Whether a product in front of attention adds its bias itself. On a GPU cuBLASLt's epilogue
    does so for nothing, and attention would for every tile that reads keys and values."""
    return x.device.type == "cuda"


def two(module):
    """A module's weight and bias; as attributes, for which torch looks last of all here, they take
    the host three times as long. What is no parameter, but computed of some, is an attribute."""
    own = module._parameters
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    return module.weight, module.bias


class Product:
    """What a linear layer does here: its bias is left to the kernel that reads its result next.
    ``weight`` and ``bias`` are the heir's."""

    packed = None  # by prepack

    def parts(self):
        """The weight and the bias."""
        return self.weight, self.bias

    def project(self, x, out, workspace):
        """What attention reads: (x Wᵀ, the bias that is left to it), or (x Wᵀ + bias, None)."""
        if not product_adds_bias(x):
            return self.matmul(x, out, workspace), self.parts()[1]
        self._check_weight()
        return F.linear(x, *self.parts()), None

    def rounds(self, x, out):
        """Whether a product of x, written to ``out``, rounds its factors to less than float32."""
        packed = self.packed
        return packed is not None and packed.rounds and out is not None and self._use_packed(x)

    def matmul(self, x, out, workspace):
        """x Wᵀ"""
        if out is not None and self._use_packed(x):
            return self.packed.forward(x, self.weight, None, None, out, workspace)
        self._check_weight()
        weight, _ = self.parts()
        if out is None:
            return F.linear(x, weight)
        return torch.mm(x, weight.t(), out=out)

    def gelu(self, x, approximate, out, workspace):
        """GELU(x Wᵀ + bias)"""
        if out is not None and self._use_packed(x):
            return self.packed.forward(x, self.weight, self.bias, approximate, out, workspace)
        self._check_weight()
        return ops.linear_gelu(x, *self.parts(), approximate=approximate, out=out)

    def prepack(self):
        """Packs the weight, anew as it was."""
        was = self.packed
        if was is not None and was.released:
            return
        how = () if was is None else (was.precision, was.x_factor)
        self.packed = ops.pack_weight(self.weight, *how)

    def _check_weight(self):
        if self.packed is not None and self.packed.released:
            raise RuntimeError(
                "for_inference() has replaced this model's weights by packed ones, for backend "
                "'cpu' and no other: load it anew"
            )

    def _use_packed(self, x):
        packed = self.packed
        if packed is None or x.dtype != torch.float32 or x.shape[-1] != packed.shape[1]:
            return False
        return ops.can_use_packed(packed, self.weight)


def prepack(model):
    """Packs every product of the model, but those whose weights packed ones have replaced."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.prepack()
    return model


def attention_precision(x, projected, dropout_p):
    """What attention rounds to: bfloat16 where all that it reads of x came of rounded products
    (csrc/cpu/encoder.cpp has the same rule). ``projected``: (product, its out) of each."""
    rounds = dropout_p == 0 and all(product.rounds(x, out) for product, out in projected)
    return "bfloat16" if rounds else "float32"


# What a packed weight is in a state dict: see bert_fast.backends.cpu.PackedWeight.elements.
PACKED_KEYS = ("weight_packed", "weight_scale", "weight_x_factor")


class Linear(Product, nn.Linear):
    def parts(self):
        return two(self)

    def _apply(self, fn, *args, **kwargs):
        if self.packed is not None and self.packed.released:  # BertModel has looked at the rest
            return super()._apply(lambda t: t if t.is_meta else fn(t), *args, **kwargs)
        module = super()._apply(fn, *args, **kwargs)
        if self.packed is not None:  # through .data, which nobody could see
            self.prepack()
        return module

    def release(self):
        """Lets go of the weight: the packed one serves in its place."""
        self.packed.release()
        gone = torch.empty_like(self.weight, device="meta")
        self.weight = nn.Parameter(gone, requires_grad=False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None and self.packed.released:
            del destination[prefix + "weight"]
            for name, value in zip(PACKED_KEYS, self.packed.elements(), strict=True):
                if value is not None:
                    destination[prefix + name] = value

    def forward(self, x):
        """x Wᵀ + bias, for those that do not read the product next by a kernel of ours."""
        if x.ndim == 2 and can_reuse_memory(x) and self._use_packed(x):
            x, out = x.contiguous(), x.new_empty(x.shape[0], self.out_features)
            return self.packed.forward(x, *self.parts(), None, out, Fresh())
        self._check_weight()
        return super().forward(x)


class View(Product):
    """A linear layer whose weights are kept elsewhere."""

    def __init__(self, weight, bias, packed=None):
        self.weight, self.bias, self.packed = weight, bias, packed
        self.out_features = weight.shape[0]


class Called:
    """Another module in the place of a linear layer: an adapter around one, a quantised one. It
    adds its bias itself."""

    def __init__(self, module):
        self.module, self.out_features = module, module.out_features

    def parts(self):
        return None, None

    def rounds(self, x, out):
        return False  # as far as anybody knows

    def matmul(self, x, out, workspace):
        return self.module(x)

    def project(self, x, out, workspace):
        return self.module(x), None

    def gelu(self, x, approximate, out, workspace):
        return ops.gelu(self.module(x), approximate=approximate)


def as_autocast_gives(x, residual):
    """``x``, the result of a layer-norm of ours, whose dtype under autocast is autocast's, in the
    dtype that torch's would have: on a GPU float32, elsewhere the wider one of the first
    ``residual``, which torch does not cast."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x
    wide = torch.float32 if device == "cuda" else residual.dtype
    return x.to(torch.promote_types(x.dtype, wide))


def feed_forward(x, up, down, norm, approximate, dropout_p, workspace):
    """LN(x + dropout(GELU(x Wᵤᵀ + bᵤ) W_dᵀ + b_d))"""
    buffer = workspace.take("intermediate", x.shape[0], up.out_features, x)
    hidden = up.gelu(x, approximate, buffer, workspace)
    return project_add_norm(hidden, down, norm, x, dropout_p, workspace)


def project_add_norm(x, linear, norm, residual, dropout_p, workspace):
    """LN(residual + dropout(x Wᵀ + b)): in inference over the residual's memory."""
    projected = linear.matmul(x, workspace.take("projected", *residual.shape, x), workspace)
    if type(residual) is ops.Rounded:
        residual, bias = residual.value, linear.parts()[1]
        if dropout_p == 0:
            return ops.layer_norm_float8(projected, *two(norm), residual, bias, norm.eps)
    return ops.layer_norm(
        projected, *two(norm), residual=residual, linear_bias=linear.parts()[1],
        eps=norm.eps, dropout_p=dropout_p, out=workspace.over(residual),
    )  # fmt: skip


def initialiser(config):
    """BERT's initialisation of one module, for ``Module.apply``."""

    def initialise(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])

    return initialise


def check_ids(name, ids, limit, input_ids=None):
    """Integers of input_ids' shape; in range where that can be seen without waiting."""
    if ids is None:
        return
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be an int64 or int32 tensor")
    if input_ids is not None:
        wanted, shape = tuple(input_ids.shape), tuple(ids.shape)
        if shape != wanted and not (name == "position_ids" and shape == (1, *wanted[1:])):
            raise ValueError(f"{name} must have input_ids' shape {wanted}, not {shape}")
    if ops.is_concrete(ids) and ids.numel():
        low, high = ops.range_of(ids)
        if low < 0 or high >= limit:
            worst = low if low < 0 else high
            raise ValueError(f"{name} holds {worst}; the model has 0 to {limit - 1}")
