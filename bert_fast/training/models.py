"""The model that a task trains and predicts with: ours of a BERT, transformers' of another family
under :func:`bert_fast.accelerate`."""

import inspect
from pathlib import Path

import torch

from bert_fast.extras import require
from bert_fast.files import CheckpointError
from bert_fast.hugging_face import accelerate
from bert_fast.models.config import read_json
from bert_fast.models.inference import encoder_of
from bert_fast.models.packed_file import packed_alone


def load_model(kind, directory, prepack=False, dtype=None, **changes):
    """``kind``: a class of bert_fast.models.heads, whose counterpart other families get.
    ``dtype``: the precision of its products in inference. ``changes``: to the config.

    Raises:
        CheckpointError: naming the file, and what is wrong or not supported.
    """
    try:
        model_type = read_json(directory / "config.json").get("model_type", "bert")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{directory}: config.json cannot be read: {error}") from error
    if model_type in ("bert", "encoder-decoder"):
        packed = packed_alone(Path(directory))
        model = kind.from_pretrained(directory, None if packed else torch.float32, **changes)
        if packed:
            served = encoder_of(model).served_in
            if dtype not in (None, served):
                raise ValueError(f"--dtype {dtype}: {directory} is packed in {served}")
            return model
        if dtype is not None and not hasattr(model, "for_inference"):
            raise ValueError(f"--dtype is for encoders; {directory} holds a {kind.__name__}")
        if dtype is not None:
            return model.for_inference(dtype)
        return model.prepack() if prepack else model
    require("transformers", f"a model of the kind {model_type!r}")
    import transformers

    if "id2label" in changes:
        changes["label2id"] = {name: i for i, name in changes["id2label"].items()}
        changes["num_labels"] = len(changes["id2label"])
    changes = {name: value for name, value in changes.items() if value is not None}
    auto = getattr(transformers, "AutoModel" + kind.__name__.removeprefix("Bert"), None)
    if auto is None:
        raise CheckpointError(f"{directory}: {model_type!r} cannot be had for this task")
    try:
        model = auto.from_pretrained(
            directory, dtype=torch.float32, ignore_mismatched_sizes="id2label" in changes, **changes
        )
        return accelerate(model.eval(), prepack=prepack, dtype=dtype)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{directory}: {error}") from error


def takes_types(model):
    """Whether a model has more than one type of token."""
    known = inspect.signature(model.forward).parameters
    ours = "token_type_ids" in known or "args" in known
    return ours and getattr(model.config, "type_vocab_size", 2) > 1
