"""The encoder under the pooling: our BertModel, or another family's model of transformers under
:func:`bert_fast.accelerate`. Packed ids in, packed vectors out."""

import contextlib
from typing import get_args

import torch

from bert_fast import ops
from bert_fast.embeddings.settings import read_json
from bert_fast.extras import missing
from bert_fast.files import CheckpointError
from bert_fast.models.bert import BertModel
from bert_fast.models.graphs import positions
from bert_fast.models.heads import BertForSequenceClassification
from bert_fast.models.inference import Precision, encoder_of
from bert_fast.models.packed_file import packed_alone
from bert_fast.models.packing import places


def load_backbone(directory, dtype=None, device="cpu", kind="AutoModel", calibration=None):
    """:class:`Bert` or :class:`Accelerated`, by config.json's model_type. ``kind``: "AutoModel", or
    "AutoModelForSequenceClassification", whose vectors are logits.

    dtype None: the checkpoint's own, but float32 for one of float16 on a CPU. ``calibration``: for
    int8, as :meth:`bert_fast.BertModel.for_inference` takes it.
    """
    values = read_json(directory / "config.json")
    dtype, precision = split_dtype(dtype, device)
    on_cpu = torch.device(device).type == "cpu"
    if dtype is None and not on_cpu:
        dtype = "auto"
    # Of a bare encoder sentence-transformers makes a scorer, of one label.
    bare = kind != "AutoModel" and not _is_classifier(values)
    options = {"num_labels": 1} if bare else {}
    ours = values.get("model_type", "bert") == "bert"
    loaded = (Bert if ours else Accelerated)(directory, values, dtype, device, kind, options)
    packed = loaded.served_in
    if packed is None and precision is not None:
        loaded.for_inference(precision, calibration)
    elif precision not in (None, packed):
        raise CheckpointError(f"{directory} is packed in {packed}: it cannot be had in {precision}")
    elif calibration is not None:
        raise ValueError(f"{directory} is packed in {packed} already")
    return loaded


def split_dtype(dtype, device):
    """(dtype to load in, precision to pack in or None) of a ``dtype`` argument: on a CPU weights
    are rounded when they are packed, not before."""
    name = str(dtype).removeprefix("torch.")
    if name in ("float8", "float8_e4m3fn"):
        raise ValueError("dtype 'float8' is experimental: BertModel.for_inference alone has it")
    if name not in get_args(Precision):
        return dtype, None
    if torch.device(device).type == "cpu":
        packed = name != "float32" or ops.why_not_packed() is None
        return torch.float32, name if packed else None
    if name == "int8":
        raise ValueError(f"dtype 'int8' is for the CPU, not for {device}")
    return dtype, None


def padded_batches(encodings, size=32):
    """A tokenizer's encodings as the keyword arguments of a model's calls."""
    for i in range(0, len(encodings), size):
        batch = encodings[i : i + size]
        parts = {"input_ids": "ids", "token_type_ids": "type_ids", "attention_mask": None}
        yield {
            name: torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(getattr(e, part) if part else [1] * len(e.ids)) for e in batch],
                batch_first=True,
            ).long()
            for name, part in parts.items()
        }


def _is_classifier(values):
    named = any("Classification" in name for name in values.get("architectures") or [])
    return named or "id2label" in values


# How results come is between us and the model, whatever its config says.
PLAIN_RESULTS = {
    "output_attentions": False, "output_hidden_states": False, "return_dict": True,
    "use_return_dict": True, "torchscript": False,
}  # fmt: skip


class Bert:
    counts_from_padding = False  # whether positions begin after the padding

    def __init__(self, directory, values, dtype, device, kind, options):
        ours = BertModel if kind == "AutoModel" else BertForSequenceClassification
        dtype = None if packed_alone(directory) else dtype
        model = ours.from_pretrained(directory, dtype, **PLAIN_RESULTS, **options)
        # prepack lays weights out for the CPU: on a GPU it would only take memory.
        on_cpu = torch.device(device).type == "cpu"
        self.model = model.prepack() if on_cpu else model.to(device)
        self.config = self.model.config
        self.positions = positions(self.model)

    @property
    def served_in(self):
        """The precision that the model was packed in, or None."""
        return encoder_of(self.model).served_in

    def for_inference(self, precision, calibration):
        self.model.for_inference(precision, calibration)

    def __call__(self, tokens, types, cu_seqlens, max_seqlen):
        """(total_tokens, hidden); of a classifier (batch, num_labels)."""
        options = dict(token_type_ids=types, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        if isinstance(self.model, BertModel):
            states, _ = self.model.encode(tokens, **options)  # without the pooler
            return states[-1]
        return self.model(tokens, **options).logits

    def around(self, numbers):
        """A context for what is done with so many numbers of the result."""
        return encoder_of(self.model).one_call.around(numbers)


def padded(tokens, types, cu_seqlens, longest, pad):
    """Packed ids and token types (or None), (total_tokens,), as (batch, longest) ones, and the mask
    of the real tokens."""
    mask = torch.arange(longest, device=tokens.device) < cu_seqlens.diff()[:, None]
    ids = tokens.new_full(mask.shape, pad).masked_scatter_(mask, tokens)
    if types is not None:
        types = torch.zeros_like(ids).masked_scatter_(mask, types)
    return ids, types, mask


class Accelerated:
    served_in = None

    def __init__(self, directory, values, dtype, device, kind, options):
        if (reason := missing("transformers")) is not None:
            raise CheckpointError(f"{directory} is no BERT: it needs transformers; {reason}")
        import transformers

        from bert_fast.hugging_face import accelerate

        given = str(values.get("dtype") or values.get("torch_dtype") or "").removeprefix("torch.")
        if dtype is None:
            dtype = torch.float32 if given == "float16" else "auto"
        on_cpu = torch.device(device).type == "cpu"
        try:
            model = getattr(transformers, kind).from_pretrained(directory, dtype=dtype, **options)
            self.model = accelerate(model.to(device).eval(), prepack=on_cpu)
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(f"{directory}: {error}") from error
        self.config = model.config
        self.pad = getattr(self.config, "pad_token_id", None) or 0
        self.positions = positions(model)
        self.counts_from_padding = self.positions < self.config.max_position_embeddings
        self.takes_types = getattr(self.config, "type_vocab_size", 0) > 1

    def for_inference(self, precision, calibration):
        from bert_fast.hugging_face import accelerate

        if calibration is not None and not self.takes_types:
            calibration = [
                {name: value for name, value in inputs.items() if name != "token_type_ids"}
                for inputs in calibration
            ]
        accelerate(self.model, dtype=precision, calibration=calibration)

    def __call__(self, tokens, types, cu_seqlens, max_seqlen):
        types = types if self.takes_types else None
        ids, types, mask = padded(tokens, types, cu_seqlens, max_seqlen, self.pad)
        options = {} if types is None else {"token_type_ids": types}
        out = self.model(ids, mask.long(), **options)
        if hasattr(out, "logits"):
            return out.logits
        index = places(mask.reshape(-1), len(tokens))
        return out.last_hidden_state.flatten(0, 1).index_select(0, index)

    def around(self, numbers):
        return contextlib.nullcontext()
