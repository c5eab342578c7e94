"""An encoder layer's kernels, launched again for the next layers, and for those of later forwards.

In inference on a GPU the layers of a model differ in their tensors alone, and for small batches the
host takes longer to check, choose and look up than the kernels take. So the first layer is run as
it stands; its launches, once they are found to be those of a layer, serve for the others, and in
the forwards that come for tokens and sequences of the same numbers (:func:`circumstances`).
"""

import functools

import torch
import torch.nn.functional as F

from bert_fast import backends
from bert_fast.devices import on_own_device
from bert_fast.ops.library import is_unseen

# With more the kernels take longer than the host: there is nothing to gain, and what the first
# layer has made, all of which lives until it has run, would be much: 14 times as much as x has, 240
# MB in 16 bits. An H100 waits for its host up to some 20,000 tokens of MiniLM, which are this many.
MOST_ELEMENTS = 2**23


def can_repeat(x):
    """Whether layers may be repeated in a forward from ``x`` on, (total_tokens, width): in
    inference, on Triton's kernels, of not too many tokens, where nobody looks at what the ops are
    given, and nothing is cast."""
    return (
        not torch.is_grad_enabled()
        and x.numel() <= MOST_ELEMENTS
        and is_unseen((x,))
        and not torch._C._is_any_autocast_enabled()
        and x.is_contiguous()
        and backends.choose("layer_norm", x.device, x.dtype, False, None, x.shape[-1]) == "triton"
    )


def circumstances(x, cu_seqlens, max_seqlen, padded_tail):
    """All that the launches of a forward depend on but its layers; None where they must not serve
    in another: somebody looks at each, or a search may choose others."""
    kernels, (launch, tuning, common) = _kernels()
    if launch.is_watched(*kernels) or tuning.is_asked():
        return None
    tokens = x.dtype, x.shape, x.device
    offsets = cu_seqlens.dtype, cu_seqlens.shape, cu_seqlens.stride(), cu_seqlens.device
    length = max_seqlen, padded_tail
    return tokens, offsets, length, common.precision(), backends.circumstances()


def launches():
    """A context: a list of the launches that are made in it."""
    return _kernels()[1][0].recorded()


@functools.cache
def _kernels():
    """A layer's, and what else is asked of the package that holds them."""
    from bert_fast.kernels import attention, common, gelu, launch, layer_norm, tuning

    norm = layer_norm._forward
    return (attention._forward, norm, gelu._forward, norm), (launch, tuning, common)


class Repeat:
    """A layer that has run, for others like it: LN(y + GELU(y Wᵤᵀ + bᵤ) W_dᵀ + b_d), where
    y = LN(x + attention(q, k, v) W_oᵀ + b_o)."""

    def __init__(self, launches):
        self.attention, self.norm, self.gelu, self.last_norm = launches
        read = self.attention
        self.strides = tuple(read[name].stride() for name in ("q", "k", "v"))
        self.statistics = read["lse"].shape

    @staticmethod
    def of(launches, x, cu_seqlens, layer, out):
        """None where ``launches`` are not those of a layer that made ``out`` of ``x``. ``layer``:
        weights and biases of its output product, norm, up, down and last norm."""
        kernels = _kernels()[0]
        if None in launches or tuple(launch.kernel for launch in launches) != kernels:
            return None
        repeat = Repeat(launches)
        if not repeat._is_of(x, cu_seqlens, layer, out):
            return None
        for launch in launches:
            launch.forget()
        return repeat

    def _is_of(self, x, cu_seqlens, layer, out):
        (_, out_bias), norm, (_, up_bias), (_, down_bias), last_norm = layer
        context, between = self.attention["out"], self.norm["out"]
        given = [(self.gelu["bias"], up_bias)]
        for launch, residual, bias, (weight, shift), result in (
            (self.norm, x, out_bias, norm, between),
            (self.last_norm, between, down_bias, last_norm, out),
        ):
            given += (
                (launch["residual"], residual), (launch["linear_bias"], bias),
                (launch["weight"], weight), (launch["bias"], shift), (launch["out"], result),
            )  # fmt: skip
        return bool(
            all(found is expected for found, expected in given)
            and context.is_contiguous()
            and context.dtype == x.dtype
            and context.numel() == x.numel()
            and self.attention["bias"] is self.attention["q"]  # in its place: there is none
            and self.attention["cu_q"] is self.attention["cu_k"] is cu_seqlens
            and self.attention.can_replace("q", "k", "v", "out", "cu_q", "lse")
            and self.gelu.can_replace("x", "bias", "out")
            and all(
                launch.can_replace("x", "residual", "linear_bias", "weight", "bias", "out")
                for launch in (self.norm, self.last_norm)
            )
        )

    def shared(self, cu_seqlens):
        """What attention is given in all layers of a forward on these offsets: them, and memory
        for the statistics that only backward reads."""
        lse = cu_seqlens.new_empty(self.statistics, dtype=torch.float32)
        return {"cu_q": cu_seqlens, "lse": lse}

    def fits(self, q, k, v):
        """Whether these have the strides of those that attention was launched on."""
        return (q.stride(), k.stride(), v.stride()) == self.strides

    def __call__(self, x, q, k, v, shared, layer):
        """The layer's output of ``x`` and its projections. ``shared``: of :meth:`shared`; ``layer``
        as in :meth:`of`, each of the dtype, shape and device of the one that it was made with."""
        return repeated_layer(x, self, (q, k, v), shared, layer)


@on_own_device("triton")
def repeated_layer(x, repeat, projected, shared, layer):
    out, norm, up, down, last_norm = layer
    q, k, v = projected
    context = torch.empty_like(x)
    repeat.attention.again(q=q, k=k, v=v, out=context, **shared)
    y = _add_and_norm(repeat.norm, F.linear(context, out[0]), x, out[1], norm)
    hidden = F.linear(y, up[0])
    active = torch.empty_like(hidden)
    repeat.gelu.again(x=hidden, bias=up[1], out=active)
    return _add_and_norm(repeat.last_norm, F.linear(active, down[0]), y, down[1], last_norm)


def _add_and_norm(launch, x, residual, linear_bias, norm):
    out = torch.empty_like(residual)
    launch.again(
        x=x, residual=residual, linear_bias=linear_bias, weight=norm[0], bias=norm[1], out=out
    )
    return out
