"""A dataclass of settings as options of the command line."""

import dataclasses
import typing
from typing import Any


def option(help: str, default: Any = dataclasses.MISSING, choices: list | None = None) -> Any:
    """A field of a dataclass of settings, with what the command line says of it."""
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:
        metadata["choices"] = choices
    return dataclasses.field(default=default, metadata=metadata)


def add_options(parser, settings):
    """An option for each field of a dataclass; its metadata are argparse's."""
    for f in dataclasses.fields(settings):
        options = dict(f.metadata)
        kinds = {int: int, float: float, int | None: int, float | None: float}
        if f.type is bool:
            options |= {"action": "store_true"}
        elif list in (f.type, *typing.get_args(f.type)):
            options |= {"nargs": "+"}
        else:
            options |= {"type": kinds.get(f.type, str)}
        if f.default is dataclasses.MISSING:
            options |= {"required": True}
        else:
            options |= {"default": f.default}
            if f.default is not None and f.type is not bool:
                options["help"] = f"{options.get('help', '')} (default {f.default})".strip()
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
