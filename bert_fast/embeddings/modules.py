"""What follows the encoder in a sentence-transformers directory: ``modules.json``, in its order."""

import torch
import torch.nn.functional as F
from torch import nn

from bert_fast.embeddings import settings
from bert_fast.embeddings.pooling import MODES, pool
from bert_fast.embeddings.settings import check_settings, read_json, read_settings
from bert_fast.files import CheckpointError
from bert_fast.models.blocks import Linear, prepack
from bert_fast.models.checkpoint import read_weights

BOOLEANS = {  # of sentence-transformers before 5.4, in the order in which results are joined
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def place(module, device):
    """Moves a module; on a CPU its products are packed, so that a row's bits are its own."""
    module.to(device)
    if torch.device(device).type == "cpu":
        prepack(module)


def by_row(activation, x):
    """``activation(x)`` of (rows, width). On a CPU torch takes other exponentials at the end of a
    tensor than inside it: a row's last bits would depend on how many rows there are."""
    elementwise = type(activation).__module__ == nn.GELU.__module__ and not hasattr(
        activation, "dim"
    )
    if not elementwise or x.device.type != "cpu" or len(x) < 2:
        return activation(x)
    return torch.cat([activation(row) for row in x.split(1)])


class Pooling(nn.Module):
    """Token vectors to one per text; several modes are joined."""

    rules = settings.POOLING

    def __init__(self, modes=("mean",), include_prompt=True):
        super().__init__()
        self.modes, self.include_prompt = tuple(modes), include_prompt

    @classmethod
    def load(cls, directory, width):
        path = directory / "config.json"
        values = read_settings(path, cls.rules)
        given = values.get("embedding_dimension", values.get("word_embedding_dimension", width))
        if given != width:
            raise CheckpointError(f"{path}: pools vectors of {given}, but is given {width}")
        modes = values.get("pooling_mode")
        if modes is None:
            modes = [mode for key, mode in BOOLEANS.items() if values.get(key)] or ["mean"]
        modes = [modes] if isinstance(modes, str) else modes
        if unknown := [mode for mode in modes if mode not in MODES]:
            raise CheckpointError(f"{path}: pooling_mode {unknown} is not one of {list(MODES)}")
        return cls(modes, values.get("include_prompt", True))

    def width(self, width):
        return width * len(self.modes)

    def pool(self, hidden, cu_seqlens, prompt_length=0):
        """(total_tokens, width) -> (batch, width of the result)."""
        skip = 0 if self.include_prompt else prompt_length
        if len(self.modes) == 1:
            return pool(hidden, cu_seqlens, self.modes[0], skip)
        return torch.cat([pool(hidden, cu_seqlens, mode, skip) for mode in self.modes], dim=1)


class Dense(nn.Module):
    """A linear layer and its activation; on a CPU its products, too, give a row the same bits
    whatever the others are."""

    rules = settings.DENSE

    def __init__(self, in_features, out_features, bias, activation, use_residual):
        super().__init__()
        self.linear = Linear(in_features, out_features, bias=bias)
        self.activation = activation
        self.use_residual = use_residual
        if use_residual and in_features != out_features:
            self.residual = Linear(in_features, out_features, bias=False)

    @classmethod
    def load(cls, directory, width):
        values = _settings_for(directory, cls.rules, "in_features", width)
        name = values.get("activation_function", "torch.nn.Tanh")
        module = cls(
            width, values["out_features"], values.get("bias", True),
            read_activation(directory / "config.json", name), values.get("use_residual", False),
        )  # fmt: skip
        return _with_weights(module, directory)

    def width(self, width):
        return self.linear.out_features

    def forward(self, x):
        out = by_row(self.activation, self.linear(x))
        if not self.use_residual:
            return out
        return out + (self.residual(x) if hasattr(self, "residual") else x)


class LayerNorm(nn.Module):
    rules = settings.LAYER_NORM

    def __init__(self, dimension):
        super().__init__()
        self.norm = nn.LayerNorm(dimension)

    @classmethod
    def load(cls, directory, width):
        _settings_for(directory, cls.rules, "dimension", width)
        return _with_weights(cls(width), directory)

    def width(self, width):
        return width

    def forward(self, x):
        return self.norm(x)


class Normalize(nn.Module):
    rules = settings.NORMALIZE

    @classmethod
    def load(cls, directory, width):
        read_settings(directory / "config.json", cls.rules)
        return cls()

    def width(self, width):
        return width

    def forward(self, x):
        return F.normalize(x, dim=1)


class Dropout(Normalize):
    """Of training: nothing is left of it here."""

    rules = settings.DROPOUT

    def forward(self, x):
        return x


KINDS = {kind.__name__: kind for kind in (Pooling, Dense, LayerNorm, Normalize, Dropout)}


def list_modules(directory):
    """(the Transformer's directory, [(class, directory) of each module after it]). Without
    modules.json: mean pooling and nothing else, which is what sentence-transformers makes of a
    directory of transformers'.

    Raises:
        CheckpointError: naming the module or the key that is not supported.
    """
    path = directory / "modules.json"
    if not path.is_file():
        return directory, []
    listed, found, transformer = read_json(path), [], None
    if not isinstance(listed, list) or not listed:
        raise CheckpointError(f"{path} must hold a list of modules")
    for module in listed:
        check_settings(path, module, settings.MODULES)
        package, _, kind = str(module.get("type", "")).rpartition(".")
        place = directory / str(module.get("path", ""))
        if package.split(".")[0] != "sentence_transformers" or kind not in (*KINDS, "Transformer"):
            raise CheckpointError(f"{path}: the module {module.get('type')} is not supported")
        if (transformer is None) != (kind == "Transformer"):
            raise CheckpointError(f"{path}: the first module, and no other, must be a Transformer")
        if kind == "Transformer":
            transformer = place
        elif (len(found) == 0) != (kind == "Pooling"):
            raise CheckpointError(f"{path}: the second module, and no other, must be a Pooling")
        else:
            found.append((KINDS[kind], place))
    if not found:
        raise CheckpointError(f"{path} has no Pooling")
    return transformer, found


def load_modules(listed, width):
    """The modules of :func:`list_modules`, for an encoder whose vectors have ``width`` numbers."""
    found = []
    for kind, place in listed:
        found.append(kind.load(place, width))
        width = found[-1].width(width)
    return found or [Pooling()]


def read_activation(path, name):
    """A torch.nn module by its name, such as "torch.nn.modules.activation.Tanh"."""
    package, _, kind = str(name).rpartition(".")
    found = getattr(nn, kind, None)
    if package.split(".")[:2] != ["torch", "nn"] or not (
        isinstance(found, type) and issubclass(found, nn.Module)
    ):
        raise CheckpointError(f"{path}: the activation {name!r} is no module of torch.nn")
    try:
        return found()
    except TypeError as error:
        raise CheckpointError(f"{path}: the activation {name!r} needs arguments") from error


def _settings_for(directory, rules, key, width):
    """A module's settings, of which ``key`` must be the width of the vectors it is given."""
    path = directory / "config.json"
    values = read_settings(path, rules)
    if values.get(key) != width:
        raise CheckpointError(f"{path}: {key} is {values.get(key)}, but vectors have {width}")
    return values


def _with_weights(module, directory):
    state, source = read_weights(directory)
    try:
        module.load_state_dict({name: value.float() for name, value in state.items()})
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit its config.json: {error}") from error
    return module.eval()
