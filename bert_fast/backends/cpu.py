"""The ``cpu`` backend: csrc/cpu through pybind11, for tensors that ops.py has validated."""

import threading

import torch

from bert_fast import _C
from bert_fast.backends import processes, tokens  # noqa: F401, tokens for ops
from bert_fast.backends.memory import packed_memory
from bert_fast.backends.threads import WithoutOpenMP, num_threads  # noqa: F401, the one for ops

if processes.forked:  # before the extension was loaded: it could not notice
    _C.forked()

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
APPROXIMATE = {"none": 0, "tanh": 1}
PRECISIONS = {"float32": 0, "bfloat16": 1, "int8": 2}


ACTIVATIONS = {None: 0, "none": 1, "tanh": 2}  # GELU's approximate, or no GELU


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def strided(tensor):
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def as_float32(parameter):
    """Biases and layer-norm weights reach the kernels as fp32, whatever the activations are."""
    if parameter is None or (parameter.dtype == torch.float32 and parameter.is_contiguous()):
        return parameter  # without two calls that give it back
    return parameter.float().contiguous()


def _seed(seed):
    return 0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF


def attention_shape(
    q, k, cu_q, cu_k, scale, causal, dropout_p, seed=0, module=None, table=None, dtable=None,
    precision="float32",
):  # fmt: skip
    rows, columns = (0, 0) if table is None else table.shape[1:]
    if table is not None and cu_q.numel() > 1:  # where max_seqlen was only said, this was not seen
        longest = int(cu_q.diff().max()), int(cu_k.diff().max())
        if longest[0] > rows or longest[1] > columns:
            raise ValueError(
                f"position_bias is for {rows} queries and {columns} keys; the longest sequences "
                f"have {longest[0]} and {longest[1]}"
            )
    return (module or _C).AttentionShape(
        dtype=DTYPES[q.dtype], batch=cu_q.numel() - 1, num_heads=q.shape[1], head_dim=q.shape[2],
        total_q=q.shape[0], total_k=k.shape[0], cu_q=cu_q.data_ptr(), cu_k=cu_k.data_ptr(),
        scale=scale, causal=causal, dropout_p=dropout_p, seed=seed,
        num_threads=num_threads(), position_bias=(address(table), rows, columns, address(dtable)),
        precision=PRECISIONS[precision],
    )  # fmt: skip


def attention_forward(
    q, k, v, cu_q, cu_k, max_q, max_k, bias, scale, causal, dropout_p, seed, out=None,
    position_bias=None, precision="float32",
):  # fmt: skip
    cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    out = q.new_empty(q.shape) if out is None else out
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    table, bias = as_float32(position_bias), as_float32(bias)
    shape = attention_shape(
        q, k, cu_q, cu_k, scale, causal, dropout_p, _seed(seed), table=table, precision=precision
    )
    _C.attention_forward(
        shape, strided(q), strided(k), strided(v), strided(out), address(bias), address(lse)
    )
    return out, lse


def attention_backward(
    dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, bias, scale, causal, dropout_p, seed,
    dq, dk, dv, position_bias=None, dposition_bias=None,
):  # fmt: skip
    cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    table, bias = as_float32(position_bias), as_float32(bias)
    shape = attention_shape(
        q, k, cu_q, cu_k, scale, causal, dropout_p, _seed(seed), table=table, dtable=dposition_bias
    )
    _C.attention_backward(
        shape, *map(strided, (q, k, v, out, dout, dq, dk, dv)), address(bias), address(lse)
    )


def layer_norm_forward(
    x, weight, bias, residual, linear_bias, eps, dropout_p, seed, out=None, training=True
):
    """Returns out, and for backward the normalised sum (None where it is x itself), mean, rstd."""
    rows, hidden = x.numel() // x.shape[-1], x.shape[-1]
    out = torch.empty_like(x) if out is None else out
    is_x = residual is None and linear_bias is None and dropout_p == 0
    total = torch.empty_like(x) if training and not is_x else None
    mean, rstd = (torch.empty(rows, dtype=torch.float32) if training else None for _ in range(2))
    weight, bias, linear_bias = as_float32(weight), as_float32(bias), as_float32(linear_bias)
    _C.layer_norm_forward(
        DTYPES[x.dtype], rows, hidden, *map(address, (x, residual, linear_bias, weight, bias)),
        *map(address, (out, total, mean, rstd)), eps, dropout_p, _seed(seed),
        num_threads(),
    )  # fmt: skip
    return out, total, mean, rstd


def layer_norm_backward(dout, total, mean, rstd, weight, has_linear_bias, dropout_p, seed):
    """Returns dx (None without dropout: it is dresidual), dresidual, dweight, dbias, and
    dlinear_bias (None without a linear bias)."""
    rows, hidden = total.numel() // total.shape[-1], total.shape[-1]
    dresidual = torch.empty_like(total)
    dx = torch.empty_like(total) if dropout_p > 0 else None
    dweight, dbias = (torch.empty(hidden, dtype=torch.float32) for _ in range(2))
    dlinear_bias = torch.empty(hidden, dtype=torch.float32) if has_linear_bias else None
    weight = as_float32(weight)
    _C.layer_norm_backward(
        DTYPES[total.dtype], rows, hidden, *map(address, (dout, total, mean, rstd, weight)),
        *map(address, (dresidual, dx, dweight, dbias, dlinear_bias)), dropout_p, _seed(seed),
        num_threads(),
    )  # fmt: skip
    return dx, dresidual, dweight, dbias, dlinear_bias


def embedding_forward(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps, dtype,
    training,
):  # fmt: skip
    """Returns out, and for backward the normalised sum, mean and rstd (else None); or None where
    an id is outside of its table."""
    rows, hidden = input_ids.numel(), word.shape[1]
    out = word.new_empty(rows, hidden, dtype=dtype)
    total = torch.empty_like(out) if training else None
    mean, rstd = (torch.empty(rows, dtype=torch.float32) if training else None for _ in range(2))
    weight, bias = as_float32(weight), as_float32(bias)
    inside = _C.embedding_forward(
        DTYPES[word.dtype], DTYPES[dtype], rows, hidden, _table(word, input_ids),
        _table(position, position_ids), _table(token_type, token_type_ids),
        *map(address, (weight, bias, out, total, mean, rstd)), eps, num_threads(),
    )  # fmt: skip
    return (out, total, mean, rstd) if inside else None


def _table(table, ids):
    return address(table), table.shape[0], *_ids(ids)


def _ids(tensor):
    return address(tensor), tensor is not None and tensor.dtype == torch.int64


def gelu_forward(x, bias, approximate, out=None):
    out = torch.empty_like(x) if out is None else out
    bias = as_float32(bias)
    _C.gelu_forward(
        DTYPES[x.dtype], x.numel() // x.shape[-1], x.shape[-1], address(x), address(bias),
        address(out), APPROXIMATE[approximate], num_threads(),
    )  # fmt: skip
    return out


def gelu_backward(dout, x, bias, approximate):
    """Returns dx and dbias (None without a bias)."""
    dx = torch.empty_like(x)
    dbias = None if bias is None else torch.empty(x.shape[-1], dtype=torch.float32)
    bias = as_float32(bias)
    _C.gelu_backward(
        DTYPES[x.dtype], x.numel() // x.shape[-1], x.shape[-1], *map(address, (dout, x, bias)),
        address(dx), address(dbias), APPROXIMATE[approximate], num_threads(),
    )  # fmt: skip
    return dx, dbias


_packing = threading.RLock()  # one thread at a time replaces what others may be reading


def is_fast(precision):
    """Whether this processor has an instruction for products of this precision."""
    return _C.linear_is_fast(PRECISIONS[precision])


def quantise(weight):
    """(int8 elements, float32 scales by row): symmetric, a row's greatest becomes 127 or -127."""
    scale = weight.abs().amax(1) / 127
    scale = scale.masked_fill(scale == 0, 1.0)  # NaN stays: its column is NaN
    return (weight / scale[:, None]).round().to(torch.int8), scale


OTHER_KIND = (
    "the instruction set has changed since the model was packed by for_inference(), and its "
    "weights are gone: load it anew, or set BERT_FAST_CPU_ISA to what it was (avx512_no_amx: "
    "AVX-512 without AMX)"
)


class PackedWeight:
    """A float32 linear layer's weight, laid out once for csrc/cpu/linear*.cpp, rounded to
    ``precision``. In fp32 it is as large as the weight itself, 2.5 times as large on processors
    with AMX, where it is there as three bf16 parts, too; in bf16 half, in int8 a quarter; and at
    most half a megabyte more, where that fills its last huge page.

    ``x_factor`` (in_features,), int8 alone: x is multiplied by it before it is rounded and the
    weight divided by it, which moves what is hard to round from the one to the other
    (:mod:`bert_fast.models.inference`).
    """

    released = False  # whether the weight itself is gone

    def __init__(self, weight, precision="float32", x_factor=None):
        self.shape, self.precision, self.x_factor = weight.shape, precision, x_factor
        self.code = PRECISIONS[precision]
        # (packed, of what, its samples): replaced as one, for other threads
        self.state = self._pack(weight)

    @classmethod
    def of_elements(cls, elements, scale=None, x_factor=None):
        """From what :meth:`elements` gave: the weight itself is not there."""
        self = cls.__new__(cls)
        names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}
        self.shape, self.precision, self.x_factor = elements.shape, names[elements.dtype], x_factor
        self.code, self.released = PRECISIONS[self.precision], True
        of = None, None, _C.linear_kind(self.code)
        self.state = self._laid_out(elements, scale), of, None
        self.scale = scale
        return self

    def __getstate__(self):  # a copy's weight lies elsewhere: it is packed anew
        packed, of, _ = self.state
        return {**self.__dict__, "state": (packed, of if self.released else None, None)}

    @staticmethod
    def possible(weight):
        """Whether the weight is of the kind that can be packed."""
        plain = weight.dtype == torch.float32 and weight.device.type == "cpu"
        return plain and not weight.is_inference()

    @property
    def rounds(self):
        """Whether products round their factors to less than float32."""
        return self.precision != "float32"

    def release(self):
        """The weight will not be there any more, nor its samples' memory."""
        self.released, self.state = True, (*self.state[:2], None)

    def elements(self):
        """(elements, scale, x_factor) as they were packed: of the precision's own dtype."""
        if self.state[1][2] != _C.linear_kind(self.code):
            raise RuntimeError(OTHER_KIND)
        dtype = {0: torch.float32, 1: torch.bfloat16, 2: torch.int8}[self.code]
        elements, packed = torch.empty(self.shape, dtype=dtype), self.state[0]
        _C.linear_unpack(self.code, *self.shape, elements.data_ptr(), packed.data_ptr())
        return elements, self.scale, self.x_factor

    def _pack(self, weight):
        dense, self.scale = weight.detach(), None
        if self.precision == "bfloat16":
            dense = dense.bfloat16()
        elif self.precision == "int8":
            factor = 1.0 if self.x_factor is None else self.x_factor
            dense, self.scale = quantise(dense / factor)
        of = self._identity(weight)
        samples = _C.Samples(weight.data_ptr(), *weight.shape, *weight.stride())
        return self._laid_out(dense.contiguous(), self.scale), of, samples

    def _laid_out(self, elements, scale):
        packed = packed_memory(_C.linear_packed_size(self.code, *self.shape))
        _C.linear_pack(
            self.code, *self.shape, *map(address, (elements, scale, self.x_factor, packed)),
            num_threads(),
        )  # fmt: skip
        return packed

    def _identity(self, weight):
        return weight.data_ptr(), weight._version, _C.linear_kind(self.code)

    def current(self, weight):
        """The packed weight's state; packed anew where it, or the instruction set asked for, has
        changed. Others may do so meanwhile: keep it for as long as its memory is used."""
        if not self.holds(weight):
            if self.released:
                raise RuntimeError(OTHER_KIND)
            with _packing:
                if not self.holds(weight):
                    self.state = self._pack(weight)
        return self.state

    def holds(self, weight):
        """Whether the weight is what was packed, by its version and by some of its numbers: who
        writes through ``.data``, as peft's merging does, changes them all and tells nobody."""
        _, of, samples = self.state
        if self.released:
            return of[2] == _C.linear_kind(self.code)
        return of == self._identity(weight) and samples.hold()

    def scratch(self, rows, threads):
        """Bytes that a product of so many rows needs."""
        return _C.linear_scratch_size(self.code, rows, self.shape[1], threads)

    def forward(self, x, weight, bias, approximate, out, workspace):
        """out = GELU(x Wᵀ + bias); ``approximate`` None means no GELU, ``bias`` None no bias. A
        weight that was changed since it was packed is packed anew."""
        packed, *_ = self.current(weight)
        (rows, width), bias = x.shape, as_float32(bias)
        threads = num_threads()
        scratch = _scratch(self.scratch(rows, threads), x, workspace)
        _C.linear_forward(
            self.code, rows, width, self.shape[0],
            *map(address, (x, packed, bias, out, scratch)), ACTIVATIONS[approximate], threads,
            x.stride(0), out.stride(0),
        )  # fmt: skip
        return out

    def of_first(self, x, cu_seqlens, weight, bias):
        """first Wᵀ + bias, (batch, out_features), of each sequence's first row of ``x``; or None
        where one has none. On the team."""
        packed, *_ = self.current(weight)
        batch, bias = cu_seqlens.numel() - 1, as_float32(bias)
        out = x.new_empty(batch, self.shape[0])
        every_one = _C.linear_of_first(
            self.code, batch, self.shape[1], self.shape[0],
            *map(address, (cu_seqlens, x, packed, bias, out)), num_threads(),
        )  # fmt: skip
        return out if every_one else None


def _scratch(size, x, workspace):
    return workspace.take("scratch", 1, (size + 3) // 4, x) if size else None


class Embeddings:
    """Tables (word, position, token type) and a layer-norm bound to csrc/cpu/embedding.cpp, for
    inference. fp32, contiguous; of who uses this see :class:`Encoder`."""

    def __init__(self, tables, norm):
        self.hidden = tables[0].shape[1]
        self.kept = [t.detach() for t in (*tables, norm.weight, norm.bias)]
        *tables, weight, bias = map(address, self.kept)
        rows = map(len, self.kept)
        norm = weight, bias, norm.eps
        self.bound = _C.Embeddings(list(zip(tables, rows, strict=False)), self.hidden, norm)

    @staticmethod
    def are_inside(ids, limits, count):
        """Whether the first ``count`` ids of each (int32, int64 or None) are in [0, limit)."""
        return _C.Embeddings.inside(list(map(_ids, ids)), limits, count)

    def forward(self, ids, rows, seqlen, cu_seqlens, index):
        """(rows, hidden) of ids, positions (None: as they stand) and token types (None: all 0):
        (batch, seqlen), at the places of ``index`` (None: all); or packed, by ``cu_seqlens``, where
        ``seqlen`` is 0. None where one is outside of its table."""
        x = self.kept[0].new_empty(rows, self.hidden)
        inside = self.bound.forward(
            list(map(_ids, ids)), rows, seqlen, *map(address, (cu_seqlens, index, x)),
            num_threads(),
        )  # fmt: skip
        return x if inside else None


class Encoder:
    """Post-norm encoder layers bound to csrc/cpu/encoder.cpp: inference in one call.

    ``layers``: for each a list of the product qkv, or of the three, and then: the product out, its
    norm, the products up and down, the last norm. Of products ``weight``, ``bias``, ``packed``, of
    norms ``weight``, ``bias``, ``eps``; fp32, contiguous. Products may change their numbers; who
    uses this sees to it that nothing of them is replaced or lies elsewhere, and that no write was
    seen by PyTorch.
    """

    def __init__(self, layers, num_heads, approximate):
        self.layers, self.num_heads, self.approximate = layers, num_heads, approximate
        self.intermediate, self.hidden = layers[0][3].weight.shape
        self.bound = self._bind()

    def _bind(self):
        """The plan, and the memory whose addresses it holds."""
        with _packing:
            kept = []
            layers = [
                [[_bound(part, kept) for part in qkv], *(_bound(part, kept) for part in rest)]
                for qkv, *rest in self.layers
            ]
            plan = _C.Encoder(
                layers, self.hidden, self.intermediate, self.num_heads,
                (self.hidden // self.num_heads) ** -0.5, ACTIVATIONS[self.approximate],
            )  # fmt: skip
            return plan, kept

    def forward(self, x, cu_seqlens, workspace):
        """x (total_tokens, hidden) becomes the last layer's output, in its own memory."""
        bound = self.bound  # kept here: another thread may bind anew meanwhile
        if not bound[0].holds():
            bound = self.bound = self._bind()
        cu_seqlens, threads = cu_seqlens.contiguous(), num_threads()
        of = x.shape[0], cu_seqlens.numel() - 1, address(cu_seqlens)
        memory = workspace.take("layers", 1, bound[0].workspace(*of, threads), x)
        bound[0].forward(*of, address(x), address(memory), threads)
        return x


def _bound(part, kept):
    """What the plan takes of a part, whose memory is put into ``kept``: that of now, whatever the
    parameters will be given through ``.data``."""
    kept += part.weight.detach(), part.bias.detach()
    if hasattr(part, "eps"):
        return address(part.weight), address(part.bias), part.eps
    packed, _, samples = part.packed.current(part.weight)
    kept.append(packed)
    return address(packed), address(part.bias), part.packed.code, samples


class Unchanged:
    """Whether Python's objects are what they were, by far fewer steps than Python takes for it.

    ``kinds``: (object, its type); ``values``: (dict, key, what it has there or None);
    ``contents``: (dict, all its values in order); ``tensors``: (tensor, its address, its version,
    or -1 where any is right). All by identity.
    """

    def __init__(self, kinds, values, contents, tensors):
        self.kept = kinds, values, contents, tensors  # for _C has but their addresses
        self.hold = _C.Unchanged(*self.kept).hold
