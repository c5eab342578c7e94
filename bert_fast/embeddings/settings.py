"""The small JSON files beside a checkpoint's weights: what of them is obeyed, and what is refused.

For each key that sentence-transformers writes there is a rule. ``OBEYED``: it is read.
``HARMLESS``: it changes no number. ``only(...)``: these values alone, because another would change
a number. A key without a rule is refused, for it might.
"""

import json
from pathlib import Path

from bert_fast.files import CheckpointError

OBEYED, HARMLESS = "obeyed", "harmless"


def only(*values):
    """Values that change nothing."""
    return values


MODULES = {
    "idx": HARMLESS,
    "name": HARMLESS,
    "path": OBEYED,
    "type": OBEYED,
    "kwargs": only([], {}),
}
MODEL = {  # config_sentence_transformers.json
    "__version__": HARMLESS,
    "requirements": HARMLESS,
    "model_type": OBEYED,
    "prompts": OBEYED,
    "default_prompt_name": OBEYED,
    "similarity_fn_name": OBEYED,
    "activation_fn": OBEYED,
    "truncate_dim": OBEYED,
}
TRANSFORMER = {  # sentence_bert_config.json
    "max_seq_length": OBEYED,
    "do_lower_case": OBEYED,
    "transformer_task": OBEYED,
    "modality_config": OBEYED,
    "module_output_name": OBEYED,
    "unpad_inputs": HARMLESS,  # padding is always dropped here
    "processing_kwargs": only(None, {}),
    "query_length": only(None),
    "document_length": only(None),
    "query_expansion": only(None),
    "model_args": only(None, {}),
    "model_kwargs": only(None, {}),
    "tokenizer_args": only(None, {}),
    "processor_kwargs": only(None, {}),
    "config_args": only(None, {}),
    "config_kwargs": only(None, {}),
    "backend": only("torch"),
}
POOLING = {
    "embedding_dimension": OBEYED,
    "word_embedding_dimension": OBEYED,
    "pooling_mode": OBEYED,
    "include_prompt": OBEYED,
    "pooling_mode_cls_token": OBEYED,
    "pooling_mode_max_tokens": OBEYED,
    "pooling_mode_mean_tokens": OBEYED,
    "pooling_mode_mean_sqrt_len_tokens": OBEYED,
    "pooling_mode_weightedmean_tokens": OBEYED,
    "pooling_mode_lasttoken": OBEYED,
}
DENSE = {
    "in_features": OBEYED,
    "out_features": OBEYED,
    "bias": OBEYED,
    "activation_function": OBEYED,
    "use_residual": OBEYED,
    "module_input_name": only("sentence_embedding"),
    "module_output_name": only("sentence_embedding", None),
}
LAYER_NORM = {"dimension": OBEYED}
NORMALIZE = {
    "module_input_name": only("sentence_embedding"),
    "module_output_name": only("sentence_embedding", None),
}
DROPOUT = {"dropout": HARMLESS}  # it is for training


def read_json(path, default=None):
    """The file's value, or ``default`` (else an empty dict) where there is no file."""
    path = Path(path)
    if not path.is_file():
        return {} if default is None else default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not a JSON file: {error}") from error


# The Transformer module's own file: the first of these that is there.
TRANSFORMER_FILES = [
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]


def read_settings(path, rules):
    """The file's keys and values; none where there is no file.

    Raises:
        CheckpointError: naming the key that ``rules`` do not know, or the value that they refuse.
    """
    values = read_json(path)
    check_settings(path, values, rules)
    return values


def check_settings(path, values, rules):
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(values).__name__}")
    for key, value in values.items():
        if key not in rules:
            raise CheckpointError(
                f"{path}: the key {key!r} is not known here; what it asks for could change numbers"
            )
        rule = rules[key]
        if isinstance(rule, tuple) and value not in rule:
            said = " or ".join(map(repr, rule))
            raise CheckpointError(f"{path}: {key} is {value!r}; only {said} is supported")
