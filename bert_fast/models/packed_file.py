"""A model packed by ``for_inference`` as a file: a quarter of the size in int8, and no calibration
when it is loaded. The layout is of no processor: weights are laid out anew."""

from pathlib import Path

from bert_fast import ops
from bert_fast.files import CheckpointError, atomic_path
from bert_fast.models.blocks import PACKED_KEYS, Linear

PACKED_FILE, FORMAT, VERSION = "bert_fast.safetensors", "bert_fast packed weights", "1"


def save_packed(model, encoder, directory):
    """Writes a packed model's weights and config, for this package alone."""
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    kind = type(model).__name__
    about = {"format": FORMAT, "version": VERSION, "model": kind, "dtype": encoder.served_in}
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
    return state, about


def fill_packed(model, encoder, state, about, path):
    """Gives ``model``, on the meta device, the weights that :func:`read_packed` read."""
    if about.get("model") != type(model).__name__:
        raise CheckpointError(f"{path} holds a {about.get('model')}, not a {type(model).__name__}")
    packed, weights = {}, []
    for name, module in encoder.layers.named_modules(prefix=_name_of(model, encoder)):
        if isinstance(module, Linear):
            packed[name] = module
    for name, module in packed.items():
        elements, *factors = (state.pop(f"{name}.{key}", None) for key in PACKED_KEYS)
        shape = None if elements is None else tuple(elements.shape)
        if shape != tuple(module.weight.shape):
            raise CheckpointError(
                f"{path} does not fit config.json: {name}.weight is {shape}, not "
                f"{tuple(module.weight.shape)}"
            )
        weights.append(ops.unpacked_weight(elements, *factors))
        state[f"{name}.weight"] = module.weight
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit config.json: {error}") from error
    for module, weight in zip(packed.values(), weights, strict=True):
        module.packed = weight
        module.release()
    encoder.served_in = about["dtype"]
    model.eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Linear) and module.packed is None:
            module.prepack()
    return model


def _name_of(model, encoder):
    prefix = next(name for name, module in model.named_modules() if module is encoder)
    return f"{prefix}.layers" if prefix else "layers"
