"""Where a checkpoint's files are: a directory, or a name on the Hugging Face Hub."""

from pathlib import Path

from bert_fast.extras import missing
from bert_fast.files import CheckpointError

# What a checkpoint is read from. Weights in other frameworks' formats are left on the Hub.
FILES = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model"]
NOT_FILES = ["onnx/*", "openvino/*", "training_args.bin", "*.msgpack", "*.h5"]


def resolve(
    name_or_path: str | Path, revision: str | None = None, cache_dir: str | Path | None = None,
    local_files_only: bool = False, *, force_download: bool = False,
    token: str | bool | None = None, subfolder: str = "",
) -> Path:  # fmt: skip
    """The directory of a checkpoint: itself, or a snapshot of a repository of the Hugging Face Hub
    (by ``huggingface_hub``, whose cache and environment variables hold, HF_HUB_OFFLINE among them).

    Args:
        name_or_path: a directory, or a repository such as "sentence-transformers/all-MiniLM-L6-v2".
        revision: of the repository: a branch, a tag or a commit.
        cache_dir: default huggingface_hub's own.
        local_files_only: look in the cache alone.
        force_download, token: as of ``huggingface_hub.snapshot_download``.
        subfolder: of the directory or repository, where the checkpoint is.

    Raises:
        CheckpointError: there is no such directory, or no such repository, or it is not in the
            cache and cannot be fetched.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return _inside(path, subfolder)
    name = str(name_or_path)
    parts = name.split("/")
    if path.is_absolute() or len(parts) > 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise CheckpointError(f"{name} is no directory, nor a repository's name, like org/model")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise CheckpointError(
            f"there is no directory {name}, and without huggingface_hub none is fetched: "
            f"{missing('huggingface_hub')}"
        ) from error
    try:
        found = snapshot_download(
            name, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only,
            force_download=force_download, token=token, allow_patterns=FILES,
            ignore_patterns=NOT_FILES,
        )  # fmt: skip
    except HFValidationError as error:
        raise CheckpointError(f"{name} is no directory, nor a repository's name") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"there is no directory {name}, and no repository of that name in the Hugging Face "
            f"cache; it could not be fetched: {error}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{name} cannot be had from the Hugging Face Hub: {error}") from error
    return _inside(Path(found), subfolder)


def _inside(directory, subfolder):
    path = directory / subfolder
    if not path.is_dir():
        raise CheckpointError(f"{directory} has no subfolder {subfolder}")
    return path
