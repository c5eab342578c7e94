"""A model packed by ``for_inference`` as a file: a quarter of the size in int8, and no calibration
when it is loaded. The layout is of no processor: weights are laid out anew."""

from pathlib import Path
from typing import get_args

import torch

from bert_fast import ops
from bert_fast.files import CheckpointError, atomic_path
from bert_fast.models.blocks import GELU_APPROXIMATE, PACKED_KEYS, Linear, prepack
from bert_fast.models.inference import Precision, encoder_of

WEIGHTS = [f"{stem}{index}" for stem in ("model.safetensors", "pytorch_model.bin")
           for index in ("", ".index.json")]  # fmt: skip


def packed_alone(directory):
    """Whether a directory has packed weights, and no others."""
    return (directory / PACKED_FILE).is_file() and not any(
        (directory / name).is_file() for name in WEIGHTS
    )


PACKED_FILE, FORMAT, VERSION = "bert_fast.safetensors", "bert_fast packed weights", "1"
# What a config says that changes results, and that no shape of a weight shows.
UNSEEN = {"num_attention_heads": int, "hidden_act": GELU_APPROXIMATE.get, "layer_norm_eps": float}


def save_packed(model, directory):
    """Writes a packed model's weights and config, for this package alone."""
    from safetensors.torch import save_file

    if encoder_of(model).served_in == "float8":
        raise ValueError("a model in float8 is not saved: save it before for_inference('float8')")
    directory = Path(directory)
    if plain := [name for name in WEIGHTS if (directory / name).is_file()]:
        raise ValueError(
            f"{directory} holds {plain[0]}, which would be loaded in the place of packed weights: "
            "save them elsewhere"
        )
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    kind = type(model).__name__
    about = {
        "format": FORMAT,
        "version": VERSION,
        "model": kind,
        "dtype": encoder_of(model).served_in,
        **{name: str(getattr(model.config, name)) for name in UNSEEN},
    }
    with atomic_path(directory / PACKED_FILE) as path:
        save_file(state, path, metadata=about)
    with atomic_path(directory / "config.json") as path:
        Path(path).write_text(model.config.to_json(kind), encoding="utf-8")


def read_packed(path):
    """(state dict, metadata) of what :func:`save_packed` wrote."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}") from error
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{path} holds no packed weights of bert_fast")
    if about.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is of version {about.get('version')}; this bert_fast reads {VERSION}"
        )
    if about.get("dtype") not in get_args(Precision):
        raise CheckpointError(f"{path} says that it is packed in {about.get('dtype')!r}")
    return state, about


def fill_packed(model, state, about, path):
    """Gives ``model``, on the meta device, the weights that :func:`read_packed` read."""
    if about.get("model") != type(model).__name__:
        raise CheckpointError(f"{path} holds a {about.get('model')}, not a {type(model).__name__}")
    for name, meaning in UNSEEN.items():
        said, wanted = about.get(name), getattr(model.config, name)
        if said is not None and meaning(said) != meaning(wanted):
            raise CheckpointError(
                f"{path} is of another model: of {name} {said}, not {wanted} as asked for"
            )
    packed, weights = {}, []
    encoder = encoder_of(model)
    prefix = "layers" if encoder is model else "bert.layers"
    for name, module in encoder.layers.named_modules(prefix=prefix):
        if isinstance(module, Linear):
            packed[name] = module
    if encoder.pooler is None:
        head = "" if encoder is model else "bert."
        state = {n: v for n, v in state.items() if not n.startswith(f"{head}pooler.")}
    for name, module in packed.items():
        elements, *factors = (state.pop(f"{name}.{key}", None) for key in PACKED_KEYS)
        shape = None if elements is None else tuple(elements.shape)
        if shape != tuple(module.weight.shape):
            raise CheckpointError(
                f"{path} does not fit config.json: {name}.weight_packed is {shape}, not "
                f"{tuple(module.weight.shape)}"
            )
        if not _fit(elements, *factors):
            raise CheckpointError(f"{path}: {name}.weight lacks its scales, or they do not fit it")
        weights.append(ops.unpacked_weight(elements, *factors))
        state[f"{name}.weight"] = module.weight
    if wrong := [n for n, v in state.items() if v.dtype != torch.float32]:
        raise CheckpointError(f"{path}: {wrong[0]} is {state[wrong[0]].dtype}, not float32")
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit config.json: {error}") from error
    for module, weight in zip(packed.values(), weights, strict=True):
        module.packed = weight
        module.release()
    encoder.one_call.forget()
    encoder.served_in = about["dtype"]
    model.eval().requires_grad_(False)
    return prepack(model)  # what is not of the layers


def _fit(elements, scale, x_factor):
    if elements.dtype in (torch.float32, torch.bfloat16):
        return scale is None and x_factor is None
    rows, columns = elements.shape
    return (
        elements.dtype == torch.int8
        and scale is not None
        and all(
            f is None or (f.dtype == torch.float32 and f.shape == (n,) and f.isfinite().all())
            for f, n in ((scale, rows), (x_factor, columns))
        )
    )
