"""Hugging Face checkpoints in and out. q, k and v are fused here, so forward never concatenates."""

import json
import pickle
import re
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from bert_fast.files import atomic_path
from bert_fast.models.config import BertConfig

# Ours -> Hugging Face's; "N" is the layer. The fused qkv stands for its three parts, in order.
NAMES = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "layers.N.attention.qkv": (
        "encoder.layer.N.attention.self.query",
        "encoder.layer.N.attention.self.key",
        "encoder.layer.N.attention.self.value",
    ),
    "layers.N.attention.out": "encoder.layer.N.attention.output.dense",
    "layers.N.attention.norm": "encoder.layer.N.attention.output.LayerNorm",
    "layers.N.cross_attention.q": "encoder.layer.N.crossattention.self.query",
    "layers.N.cross_attention.kv": (
        "encoder.layer.N.crossattention.self.key",
        "encoder.layer.N.crossattention.self.value",
    ),
    "layers.N.cross_attention.out": "encoder.layer.N.crossattention.output.dense",
    "layers.N.cross_attention.norm": "encoder.layer.N.crossattention.output.LayerNorm",
    "layers.N.feed_forward.up": "encoder.layer.N.intermediate.dense",
    "layers.N.feed_forward.down": "encoder.layer.N.output.dense",
    "layers.N.feed_forward.norm": "encoder.layer.N.output.LayerNorm",
    "pooler": "pooler.dense",
}
HEADS = ("cls.", "classifier.", "qa_outputs.", "decoder.cls.")
# In front of a BERT's names where it is a part: of a task's model, or of an encoder-decoder.
PREFIX = re.compile(r"(bert\.|encoder\.|decoder\.bert\.)?")
# Heads and buffers that a checkpoint of a whole task model carries beside the encoder.
NOT_OURS = re.compile(
    r"(decoder\.)?(cls|classifier|qa_outputs)\.|embeddings\.position_ids$|pooler\."
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and what is wrong with it."""


def hugging_face_names(name):
    """The Hugging Face keys of one of our parameters: three for qkv, two for kv, else one. Heads
    have Hugging Face's names already."""
    if name.startswith(HEADS):
        return [name]
    prefix = PREFIX.match(name)[0]
    name = name.removeprefix(prefix)
    module, _, kind = name.rpartition(".")
    layer = re.search(r"\d+", module)
    theirs = NAMES[re.sub(r"\d+", "N", module)]
    theirs = [theirs] if isinstance(theirs, str) else theirs
    return [f"{prefix}{t.replace('N', layer[0], 1) if layer else t}.{kind}" for t in theirs]


def from_hugging_face(state, model, source):
    """Hugging Face's state dict as ours, for ``model``'s parameters.

    Raises:
        CheckpointError: naming missing and misshapen keys. Unexpected ones are warned about, and
            those of a head, which keeps its initialisation.
    """
    state = {_modern_key(key): value for key, value in state.items()}
    ours, missing, misshapen, fresh = {}, [], [], []
    for name, parameter in model.state_dict().items():
        theirs = [key.removeprefix("bert.") for key in hugging_face_names(name)]
        absent = [key for key in theirs if key not in state]
        if absent and name.startswith((*HEADS, "bert.pooler.")):
            ours[name] = parameter  # as initialised
            fresh += absent
            continue
        if absent:
            missing += absent
            continue
        parts = [state.pop(key) for key in theirs]
        wanted = (parameter.shape[0] // len(parts), *parameter.shape[1:])
        wrong = [
            f"{key} is {tuple(part.shape)}, not {wanted}"
            for key, part in zip(theirs, parts, strict=True)
            if tuple(part.shape) != wanted
        ]
        misshapen += wrong
        if not wrong:
            ours[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    if missing:
        raise CheckpointError(f"{source} lacks {_listing(missing)}")
    if misshapen:
        raise CheckpointError(f"{source} does not fit config.json: {_listing(misshapen)}")
    if fresh:
        warnings.warn(
            f"{source} has no {_listing(fresh)}: newly initialised, to be trained", stacklevel=4
        )
    unexpected = [key for key in state if not NOT_OURS.match(key)]
    if unexpected:
        warnings.warn(f"{source}: unexpected, not loaded: {_listing(unexpected)}", stacklevel=4)
    return ours


def to_hugging_face(state):
    """Our state dict as Hugging Face's: qkv cut in three, kv in two."""
    theirs = {}
    for name, value in state.items():
        keys = hugging_face_names(name)
        theirs.update(zip(keys, value.chunk(len(keys)), strict=True))
    return theirs


def _modern_key(key):
    key = key.removeprefix("bert.")
    return re.sub(
        r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key)
    )


def _listing(names, limit=8):
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def load(make, directory, dtype=None, config_class=None, **changes):
    """The model that ``make(config, state)`` returns, with a checkpoint's weights. ``changes``: to
    its config, of ``config_class``, by default BertConfig. See
    :meth:`bert_fast.BertModel.from_pretrained`."""
    directory = Path(directory)
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{directory} has no config.json: not a checkpoint's directory")
    try:
        config = replace((config_class or BertConfig).from_json(config_path), **changes)
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    state, source = _read_weights(directory)
    model = make(config, state)
    weights = from_hugging_face(state, model, source)
    model.load_state_dict(
        {name: w.to(dtype or w.dtype) for name, w in weights.items()}, assign=True
    )
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model.eval()


def _read_weights(directory):
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        path = directory / name
        if path.is_file():
            break
    else:
        raise CheckpointError(f"{directory} has neither model.safetensors nor pytorch_model.bin")
    if path.suffix == ".json":
        try:
            shards = sorted(
                set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} is no index of shards: {error!r}") from error
        state = {}
        for shard in shards:
            state |= _read_safetensors(directory / Path(shard).name)
        return state, path
    if path.suffix == ".safetensors":
        return _read_safetensors(path), path
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds pickled code or is damaged, and was not executed: {error}"
        ) from error
    except Exception as error:  # a damaged archive makes torch.load raise nearly anything
        raise CheckpointError(f"{path} is truncated or corrupt: {error}") from error
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise CheckpointError(f"{path} is not a state dict of tensors")
    return state, path


def _read_safetensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}") from error


def save(model, directory):
    """See :meth:`bert_fast.BertModel.save_pretrained`. Files appear whole or not at all."""
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous().clone() for k, v in to_hugging_face(model.state_dict()).items()}
    with atomic_path(directory / "model.safetensors") as path:
        save_file(state, path, metadata={"format": "pt"})
    with atomic_path(directory / "config.json") as path:
        Path(path).write_text(model.config.to_json(type(model).__name__), encoding="utf-8")
