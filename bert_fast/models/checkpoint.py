"""Hugging Face checkpoints in and out. q, k and v are fused here, so forward never concatenates."""

import json
import pickle
import re
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from bert_fast.files import CheckpointError, atomic_path
from bert_fast.models.arguments import DTYPES, take
from bert_fast.models.config import BertConfig, read_json
from bert_fast.models.hub import resolve
from bert_fast.models.inference import encoder_of
from bert_fast.models.packed_file import (
    PACKED_FILE,
    fill_packed,
    packed_alone,
    read_packed,
    save_packed,
)

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
    """Hugging Face's state dict, its keys by :func:`_modern`, as ours, for ``model``'s parameters.

    Raises:
        CheckpointError: naming missing and misshapen keys. Unexpected ones are warned about, and
            those of a head, which keeps its initialisation.
    """
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
    if inside := [key for key in unexpected if INSIDE.search(key)]:
        raise CheckpointError(
            f"{source} holds more than this BERT: {_listing(inside)}; without them other numbers "
            "would come out"
        )
    if unexpected:
        warnings.warn(f"{source}: unexpected, not loaded: {_listing(unexpected)}", stacklevel=4)
    return ours


def to_hugging_face(state):
    """Our state dict as Hugging Face's: qkv cut in three, kv in two."""
    theirs = {}
    for name, value in state.items():
        keys = hugging_face_names(name)
        theirs.update(zip(keys, value.chunk(len(keys)), strict=True))
    head = "cls.predictions"
    if f"{head}.decoder.weight" in theirs:  # not tied: transformers keeps the bias there, too
        theirs[f"{head}.decoder.bias"] = theirs[f"{head}.bias"]
    return theirs


# Parameters of layers that this model has not.
INSIDE = re.compile(r"(^|\.)(encoder\.layer|embeddings)\.")
# What compiling, data parallelism and checkpointing wrap around a module's name.
WRAPPERS = re.compile(r"^(module\.)+|(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Parts of weights that are no plain numbers: of adapters, of quantised matrices, of
# parametrisations. Without them other numbers would come out.
ADAPTER = re.compile(r"^base_model\.|\blora_|\.ia3_|modules_to_save\.|\.base_layer\.")
NOT_PLAIN = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|CB|weight_format|absmax|quant_map|nested_absmax|quant_state"
    r"[^.]*|bitsandbytes__.*|weight_scale|weight_g|weight_v|original0|original1|_packed_params.*"
    r"|zero_point|scale)$|\.weight\.(absmax|quant_map|nested_.*|quant_state.*)$|parametrizations\."
)


def _modern(state, source):
    """Keys as transformers writes them today, however the model was wrapped when it was saved."""
    if adapters := [key for key in state if ADAPTER.search(key)]:
        raise CheckpointError(
            f"{source} holds a PEFT adapter ({_listing(adapters, 2)}): merge it into the model "
            "first, by merge_and_unload(), and save that"
        )
    if parts := [key for key in state if NOT_PLAIN.search(key)]:
        raise CheckpointError(
            f"{source} holds quantised or parametrised weights ({_listing(parts, 2)}), which are "
            "not supported: save the model in floating point"
        )
    if whole := [k for k, v in state.items() if k.endswith("weight") and not v.is_floating_point()]:
        raise CheckpointError(f"{source}: {_listing(whole)} hold {state[whole[0]].dtype}")
    found = {}
    for key, value in state.items():
        modern = WRAPPERS.sub("", WRAPPERS.sub("", key)).removeprefix("bert.")
        modern = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", modern)
        modern = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", modern)
        if modern in found and not torch.equal(found[modern], value):
            raise CheckpointError(f"{source} holds {modern} twice, by different names")
        found[modern] = value
    return found


def _listing(names, limit=8):
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def load(make, name, config_class=BertConfig, head=None, **options):
    """The model that ``make(config, state)`` returns, with a checkpoint's weights. ``options``: of
    :mod:`bert_fast.models.arguments`, and changes to the config, a ``config_class``. ``head``: the
    name of a classifier's module, whose size decides where config.json does not. See
    :meth:`bert_fast.BertModel.from_pretrained`."""
    given, changes = take(options)
    directory = resolve(name, **given.hub)
    config_path = directory / "config.json"
    if (directory / "adapter_config.json").is_file() and not config_path.is_file():
        raise CheckpointError(
            f"{directory} holds a PEFT adapter alone: load its model with peft, merge_and_unload() "
            "it, and save that"
        )
    if given.config is None and not config_path.is_file():
        raise CheckpointError(f"{directory} has no config.json: not a checkpoint's directory")
    try:
        if given.config is None:
            config = config_class.from_json(config_path, **changes)
        else:
            config = config_class.from_config(given.config, **changes)
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    if packed_alone(directory):
        return _load_packed(make, config, directory / PACKED_FILE, given).to(given.device)
    state, source = read_weights(directory, given.variant, given.use_safetensors)
    state = _modern(state, source)
    if given.config is not None or "num_hidden_layers" in changes:
        _leave_out_layers(state, config.num_hidden_layers, source)
    config = _with_decoder(config, state, source)
    if head is not None:
        chosen = given.config is not None or "id2label" in changes
        config = _labelled(config, state, head, chosen, source, given.ignore_mismatched_sizes)
    model = make(config, state)
    weights = from_hugging_face(state, model, source)
    dtype = _declared(config_path if given.config is None else given.config, given.dtype)
    model.load_state_dict({name: _cast(w, dtype) for name, w in weights.items()}, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model.eval().to(given.device)


def _load_packed(make, config, path, given):
    state, about = read_packed(path)
    if given.variant is not None or given.use_safetensors is False:
        raise CheckpointError(f"{path} is all that there is: no variant, no PyTorch's weights")
    dtype = given.dtype
    if dtype not in (None, "auto", DTYPES.get(about["dtype"])):
        raise CheckpointError(f"{path} is packed in {about['dtype']}: it cannot be had in {dtype}")
    with torch.device("meta"):
        model = make(config, state)
    return fill_packed(model, state, about, path)


def _leave_out_layers(state, count, source):
    """What is in ``state`` of layers past the first ``count``, which were asked for, goes."""
    further = [
        key for key in state
        if (layer := re.match(r"encoder\.layer\.(\d+)\.", key)) and int(layer[1]) >= count
    ]  # fmt: skip
    if further:
        warnings.warn(
            f"{source}: only its first {count} layers are used, as asked for; not loaded: "
            f"{_listing(further, 2)}",
            stacklevel=4,
        )
    for key in further:
        del state[key]


def _declared(config, dtype):
    """``dtype``, or where it is None or "auto" what the config (or its file) says that is computed
    in."""
    values = read_json(config) if isinstance(config, Path) else vars(config)
    said = str(values.get("dtype") or values.get("torch_dtype")).removeprefix("torch.")
    if dtype not in (None, "auto") or said not in DTYPES:
        return dtype
    return torch.float32 if dtype is None and said == "float16" else DTYPES[said]


def _cast(weight, dtype):
    if dtype is None:  # float16 is for GPUs: processors compute it slowly, and overflow
        dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    return weight if dtype == "auto" else weight.to(dtype)


def _with_decoder(config, state, source):
    """The config, and in ``state`` the vocabulary's bias where it is kept. What transformers ties
    comes in two copies, and where they differ it takes the decoder's, and so do we."""
    head = "cls.predictions"
    if (bias := state.pop(f"{head}.decoder.bias", None)) is not None:
        state[f"{head}.bias"] = bias
    own, words = state.get(f"{head}.decoder.weight"), state.get("embeddings.word_embeddings.weight")
    if not getattr(config, "tie_word_embeddings", False) or own is None or words is None:
        return config
    if own.shape == words.shape and torch.equal(own, words):
        return config
    warnings.warn(
        f"{source}: config.json ties the decoder's weight to the embeddings, and they differ: they "
        "are kept apart",
        stacklevel=5,
    )
    return replace(config, tie_word_embeddings=False)


def _labelled(config, state, head, chosen, source, ignore_mismatched_sizes):
    """The config with as many labels as the checkpoint's head has, where it names none; a head of
    another size than what was ``chosen`` is left out, to be new."""
    weight = state.get(f"{head}.weight")
    if weight is not None and not chosen and config.id2label is None:
        id2label = dict(enumerate(config.label_names(weight.shape[0])))
        return replace(config, id2label=id2label, label2id={n: i for i, n in id2label.items()})
    if weight is None or weight.shape[0] == config.num_labels:
        return config
    if not chosen and not ignore_mismatched_sizes:
        raise CheckpointError(
            f"{source}: the {head} has {weight.shape[0]} labels, config.json names "
            f"{config.num_labels}; num_labels= makes a new one"
        )
    warnings.warn(
        f"{source}: its {head} has {weight.shape[0]} labels, not the {config.num_labels} asked for",
        stacklevel=5,
    )
    for part in ("weight", "bias"):
        state.pop(f"{head}.{part}", None)
    return config


def read_weights(directory, variant=None, use_safetensors=None):
    """(state dict, the file) of a directory's weights: safetensors, whole or in shards, or
    PyTorch's, read without unpickling code. ``variant``: "fp16" is of model.fp16.safetensors.
    ``use_safetensors``: True for these alone, False for PyTorch's."""
    kinds = {True: ["model.safetensors"], False: ["pytorch_model.bin"]}.get(
        use_safetensors, ["model.safetensors", "pytorch_model.bin"]
    )
    of = f".{variant}." if variant else "."
    kinds = [kind.rpartition(".") for kind in kinds]
    whole = {f"{stem}{of}{end}": f"{stem}.{end}.index{of}json" for stem, _, end in kinds}
    for path in (directory / name for pair in whole.items() for name in pair):
        if path.is_file():
            break
    else:
        raise CheckpointError(f"{directory} has neither {' nor '.join(whole)}")
    if path.suffix == ".json":
        try:
            shards = sorted(
                set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} is no index of shards: {error!r}") from error
        state = {}
        for shard in shards:
            state |= _read_file(directory / Path(shard).name)
        return state, path
    return _read_file(path), path


def _read_file(path):
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
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
    return state


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

    if getattr(encoder_of(model), "served_in", None) is not None:
        return save_packed(model, directory)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous().clone() for k, v in to_hugging_face(model.state_dict()).items()}
    with atomic_path(directory / "model.safetensors") as path:
        save_file(state, path, metadata={"format": "pt"})
    with atomic_path(directory / "config.json") as path:
        Path(path).write_text(model.config.to_json(type(model).__name__), encoding="utf-8")
