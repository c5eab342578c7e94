"""What ``config.json`` says of a BERT, by Hugging Face's own names."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bert_fast.models.blocks import GELU_APPROXIMATE


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

    @classmethod
    def from_json(cls, path: str | Path) -> "BertConfig":
        """Reads ``config.json``.

        Raises:
            ValueError: not JSON, another architecture, or a BERT this model is not.
        """
        values = read_json(path)
        if isinstance(values, dict) and values.get("is_decoder"):
            raise ValueError(f"{path}: is_decoder is set; this BertModel is an encoder")
        return cls.from_dict(values, path)

    @classmethod
    def from_dict(cls, values: dict, source: str | Path) -> "BertConfig":
        """What ``config.json`` holds. ``source`` is named in errors."""
        if not isinstance(values, dict):
            raise ValueError(f"{source} must hold a JSON object")
        if values.get("model_type", "bert") != "bert":
            raise ValueError(f"{source}: model_type is {values['model_type']!r}, not 'bert'")
        positions = values.get("position_embedding_type") or "absolute"
        if positions != "absolute":
            raise ValueError(f"{source}: position_embedding_type {positions!r} is not supported")
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict:
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {"model_type": "bert", **values}

    def to_json(self, architecture: str = "BertModel") -> str:
        return json.dumps({"architectures": [architecture], **self.to_dict()}, indent=2) + "\n"


def read_json(path):
    """What a JSON file holds; a ValueError that names it, where it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
