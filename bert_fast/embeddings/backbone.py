"""The encoder under the pooling: our BertModel, or another family's model of transformers under
:func:`bert_fast.accelerate`. Packed ids in, packed vectors out."""

import torch

from bert_fast.embeddings.settings import read_json
from bert_fast.extras import missing
from bert_fast.files import CheckpointError
from bert_fast.models.bert import BertModel
from bert_fast.models.heads import BertForSequenceClassification


def load_backbone(directory, dtype=None, device="cpu", kind="AutoModel"):
    """:class:`Bert` or :class:`Accelerated`, by config.json's model_type. ``kind``: "AutoModel", or
    "AutoModelForSequenceClassification", whose vectors are logits.

    dtype None: the checkpoint's own, but float32 for one of float16 on a CPU.
    """
    model_type = read_json(directory / "config.json").get("model_type", "bert")
    on_cpu = torch.device(device).type == "cpu"
    if dtype is None and not on_cpu:
        dtype = "auto"
    return (Bert if model_type == "bert" else Accelerated)(directory, dtype, device, kind, on_cpu)


def _is_classifier(directory):
    values = read_json(directory / "config.json")
    named = any("Classification" in name for name in values.get("architectures") or [])
    return named or "id2label" in values


class Bert:
    counts_from_padding = False  # whether positions begin after the padding

    def __init__(self, directory, dtype, device, kind, on_cpu):
        ours = BertModel if kind == "AutoModel" else BertForSequenceClassification
        # Of a bare encoder sentence-transformers makes a scorer, of one label.
        bare = kind != "AutoModel" and not _is_classifier(directory)
        model = ours.from_pretrained(directory, dtype, **({"num_labels": 1} if bare else {}))
        # prepack lays weights out for the CPU: on a GPU it would only take memory.
        self.model = model.prepack() if on_cpu else model.to(device)
        self.config = self.model.config
        self.positions = self.config.max_position_embeddings

    def __call__(self, tokens, types, cu_seqlens, max_seqlen):
        """(total_tokens, hidden); of a classifier (batch, num_labels)."""
        options = dict(token_type_ids=types, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        if isinstance(self.model, BertModel):
            states, _ = self.model.encode(tokens, **options)  # without the pooler
            return states[-1]
        return self.model(tokens, **options).logits


class Accelerated:
    def __init__(self, directory, dtype, device, kind, on_cpu):
        if (reason := missing("transformers")) is not None:
            raise CheckpointError(f"{directory} is no BERT: it needs transformers; {reason}")
        import transformers

        from bert_fast.hugging_face import accelerate

        low = read_json(directory / "config.json")
        given = str(low.get("dtype") or low.get("torch_dtype") or "").removeprefix("torch.")
        if dtype is None:
            dtype = torch.float32 if on_cpu and given == "float16" else "auto"
        try:
            bare = kind != "AutoModel" and not _is_classifier(directory)
            options = {"num_labels": 1} if bare else {}
            model = getattr(transformers, kind).from_pretrained(directory, dtype=dtype, **options)
            self.model = accelerate(model.to(device).eval(), prepack=on_cpu)
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(f"{directory}: {error}") from error
        self.config = model.config
        self.pad = getattr(self.config, "pad_token_id", None) or 0
        # RoBERTa's first position is the one after the padding's.
        first = getattr(getattr(model.base_model, "embeddings", None), "padding_idx", None)
        offset = first + 1 if first is not None and self.pad == first else 0
        self.positions = self.config.max_position_embeddings - offset
        self.counts_from_padding = offset > 0
        self.takes_types = getattr(self.config, "type_vocab_size", 0) > 1

    def __call__(self, tokens, types, cu_seqlens, max_seqlen):
        lengths = cu_seqlens.diff()
        mask = torch.arange(max_seqlen, device=tokens.device) < lengths[:, None]
        ids = tokens.new_full(mask.shape, self.pad).masked_scatter_(mask, tokens)
        options = {}
        if self.takes_types:
            options["token_type_ids"] = torch.zeros_like(ids).masked_scatter_(mask, types)
        out = self.model(ids, mask.long(), **options)
        return out.logits if hasattr(out, "logits") else out.last_hidden_state[mask]
