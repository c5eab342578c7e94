"""What ``config.json`` says of a BERT, by Hugging Face's own names."""

import json
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bert_fast.models.blocks import GELU_APPROXIMATE

# Keys of config.json that are not fields below. What these ask for would change numbers: only the
# values here are accepted. is_decoder and add_cross_attention are judged by who reads the file.
REFUSED = {
    "position_embedding_type": ("absolute",),
    "pruned_heads": ({},),
    "quantization_config": (),
    "auto_map": ({},),  # code of the checkpoint's own
    "cross_attention_hidden_size": (),
    "tie_encoder_decoder": (False,),
    "use_bfloat16": (False,),
    "output_attentions": (False,),
    "return_dict": (True,),  # results are named tuples, with None where there is nothing
    "use_return_dict": (True,),
    "torchscript": (False,),
}
# These change none: what is written down about a file, how another library computes or answers, how
# a text is generated, heads of other models.
HARMLESS = {
    "add_cross_attention", "architectures", "attn_implementation", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "classifiers_size",
    "custom_pipelines", "decoder_start_token_id", "directionality", "diversity_penalty",
    "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "is_decoder", "is_encoder_decoder", "language",
    "length_penalty", "mask_token_id", "max_length", "min_length", "model_name", "name_or_path",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_past", "output_scores",
    "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
    "pooler_type", "prefix", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "sbert_ce_default_activation_function", "sentence_transformers",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "transformers_version", "typical_p",
    "unk_token_id", "use_cache",
}  # fmt: skip


@dataclass
class BertConfig:
    """Hugging Face's ``config.json``, by its own names and defaults."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    id2label: dict | None = None
    label2id: dict | None = None
    problem_type: str | None = None
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True
    output_hidden_states: bool = False

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (not isinstance(value, int) or value < 1):
                raise ValueError(f"config: {field.name} must be a positive integer, not {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in GELU_APPROXIMATE:
            known = ", ".join(GELU_APPROXIMATE)
            raise ValueError(f"config: hidden_act must be one of {known}, not {self.hidden_act!r}")

    @property
    def num_labels(self) -> int:
        """Of a classifier; Hugging Face's default is 2."""
        return 2 if self.id2label is None else len(self.id2label)

    def label_names(self, count: int) -> list[str]:
        """Of ``count`` labels, in the order of their numbers; "LABEL_0" ... where there is none."""
        given = self.id2label or {}
        return [str(given.get(i, f"LABEL_{i}")) for i in range(count)]

    @classmethod
    def from_json(cls, path: str | Path, **changes: Any) -> "BertConfig":
        """Reads ``config.json``; ``changes`` stand in the place of what it says.

        Raises:
            TypeError: a change to what no config has.
            ValueError: not JSON, another architecture, or a BERT this model is not.
        """
        return cls._of_encoder(read_json(path), path, changes)

    @classmethod
    def from_config(cls, config: Any, **changes: Any) -> "BertConfig":
        """A config of ours or of transformers'; raises as :meth:`from_json`."""
        if not hasattr(config, "to_dict"):
            raise TypeError(f"config must be a BertConfig, not a {type(config).__name__}")
        return cls._of_encoder(config.to_dict(), "config", changes)

    @classmethod
    def _of_encoder(cls, values, source, changes):
        known = {field.name for field in fields(cls)} | set(REFUSED) | HARMLESS | {"num_labels"}
        if unknown := sorted(set(changes) - known):
            raise TypeError(f"from_pretrained: neither an argument nor of a config: {unknown[0]}=")
        if not isinstance(values, dict):
            raise ValueError(f"{source} must hold a JSON object")
        if {"num_labels", "id2label"} & set(changes):
            values = {k: v for k, v in values.items() if k not in ("id2label", "label2id")}
        values = values | changes
        for name in ("is_decoder", "add_cross_attention"):
            if values.get(name):
                raise ValueError(f"{source}: {name} is set; this BertModel is an encoder")
        return cls.from_dict(values, source)

    @classmethod
    def from_dict(cls, values: dict, source: str | Path) -> "BertConfig":
        """What ``config.json`` holds. ``source`` is named in errors."""
        if not isinstance(values, dict):
            raise ValueError(f"{source} must hold a JSON object")
        if values.get("model_type", "bert") != "bert":
            raise ValueError(f"{source}: model_type is {values['model_type']!r}, not 'bert'")
        known = {field.name for field in fields(cls)}
        for name, value in values.items():
            if name in REFUSED and value not in (*REFUSED[name], None):
                raise ValueError(f"{source}: {name} {value!r} is not supported")
        unknown = set(values) - known - set(REFUSED) - HARMLESS - {"model_type", "num_labels"}
        if names := sorted(n for n in unknown if not n.startswith("_")):
            warnings.warn(f"{source}: not known, not used: {', '.join(names)}", stacklevel=6)
        found = {name: value for name, value in values.items() if name in known}
        return cls(**{**found, **_labels(values, source)})

    def to_dict(self) -> dict:
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {"model_type": "bert", **values}

    def to_json(self, architecture: str = "BertModel") -> str:
        return json.dumps({"architectures": [architecture], **self.to_dict()}, indent=2) + "\n"


def _labels(values, source):
    """id2label by number, in order; from label2id, or num_labels, where it is missing."""
    given, names = values.get("id2label"), values.get("label2id")
    try:
        if not given and names:
            given = {number: name for name, number in names.items()}
        if not given and values.get("num_labels"):
            given = {i: f"LABEL_{i}" for i in range(int(values["num_labels"]))}
        if not given:
            return {}
        given = {int(number): str(name) for number, name in given.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: id2label must map numbers to names: {error}") from error
    if sorted(given) != list(range(len(given))):
        raise ValueError(f"{source}: id2label must name 0 to {len(given) - 1}: {sorted(given)}")
    id2label = {number: given[number] for number in range(len(given))}
    return {"id2label": id2label, "label2id": {name: n for n, name in id2label.items()}}


def read_json(path):
    """What a JSON file holds; a ValueError that names it, where it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
