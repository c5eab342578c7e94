"""The keyword arguments of transformers' ``from_pretrained``: what of them is obeyed here, and what
is refused by name. What is neither is a change to the config."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}  # fmt: skip
# How transformers computes and loads: numbers are the same, whatever they say.
HARMLESS = {
    "low_cpu_mem_usage", "trust_remote_code", "weights_only", "resume_download", "mirror",
    "proxies", "max_memory", "offload_buffers", "use_kernels", "_fast_init", "_commit_hash",
    "_from_auto", "_from_pipeline", "allow_all_kernels", "disable_mmap", "fusion_config",
    "tqdm_class",
}  # fmt: skip
# Only these values, which ask for nothing. None does for all of them.
REFUSED = {
    "state_dict": (), "from_tf": (False,), "from_flax": (False,), "output_loading_info": (False,),
    "quantization_config": (), "load_in_8bit": (False,), "load_in_4bit": (False,),
    "gguf_file": (), "adapter_name": ("default",), "adapter_kwargs": ({},), "key_mapping": (),
    "tp_plan": (), "tp_size": (), "device_mesh": (), "distributed_config": (),
    "offload_folder": (), "offload_state_dict": (False,), "return_unused_kwargs": (False,),
    "generation_config": (), "kernel_config": (), "experts_implementation": (),
}  # fmt: skip
# Of attn_implementation: all compute the same attention, and here it is ours.
ATTENTIONS = (
    None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4",
    "flex_attention", "bert_fast",
)  # fmt: skip


@dataclass
class Arguments:
    """What is obeyed; see :meth:`bert_fast.BertModel.from_pretrained`."""

    dtype: Any = None
    torch_dtype: Any = None
    device_map: Any = None
    config: Any = None
    ignore_mismatched_sizes: bool = False
    variant: str | None = None
    use_safetensors: bool | None = None
    revision: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False
    token: str | bool | None = None
    use_auth_token: str | bool | None = None
    subfolder: str = ""

    def __post_init__(self):
        self.dtype = check_dtype(self.torch_dtype if self.dtype is None else self.dtype)
        self.token = self.use_auth_token if self.token is None else self.token
        self.device = _device(self.device_map)

    @property
    def hub(self) -> dict[str, Any]:
        """Those of :func:`bert_fast.models.hub.resolve`."""
        names = "revision", "cache_dir", "local_files_only", "force_download", "token", "subfolder"
        return {name: getattr(self, name) for name in names}


def take(options: dict[str, Any]) -> tuple[Arguments, dict[str, Any]]:
    """``from_pretrained``'s keyword arguments: those that are obeyed, and the rest.

    Raises:
        ValueError: naming an argument, or a value of one, that is not supported.
    """
    for name, value in options.items():
        if name in REFUSED and value is not None and value not in REFUSED[name]:
            raise ValueError(f"from_pretrained: {name}= is not supported")
    if (attention := options.get("attn_implementation")) not in ATTENTIONS:
        raise ValueError(
            f"from_pretrained: attn_implementation {attention!r} is not known; the attention here "
            f"computes what {', '.join(map(repr, ATTENTIONS[1:]))} do"
        )
    ours = {field.name for field in fields(Arguments)}
    passed = ours | HARMLESS | set(REFUSED) | {"attn_implementation"}
    rest = {name: value for name, value in options.items() if name not in passed}
    return Arguments(**{name: options[name] for name in ours & set(options)}), rest


def check_dtype(dtype):
    """None, "auto" or a torch.dtype, which may be given by its name."""
    named = DTYPES.get(dtype.removeprefix("torch."), dtype) if isinstance(dtype, str) else dtype
    if named is not None and named != "auto" and named not in DTYPES.values():
        raise ValueError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, not {dtype!r}")
    return named


def _device(device_map):
    """The one device of a ``device_map``."""
    if isinstance(device_map, dict):
        if len(set(map(str, device_map.values()))) != 1:
            raise ValueError(f"from_pretrained: device_map must name one device, not {device_map}")
        device_map = next(iter(device_map.values()))
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device_map == "disk":
        raise ValueError("from_pretrained: device_map 'disk' is not supported")
    return None if device_map is None else torch.device(device_map)
