"""Optional packages: which extra brings them, said where one is missing."""

import importlib.util
import warnings

EXTRAS = {
    "huggingface_hub": "hf",
    "transformers": "hf",
    "matplotlib": "plot",
    "sacrebleu": "translate",
    "triton": "triton",
    "onnxruntime": "bench",
    "onnx": "bench",
    "openvino": "bench",
    "nncf": "bench",
    "ctranslate2": "bench",
}
# What no extra brings, for it is bound to a version of torch or to a maker's processors.
ALONE = ("torchao", "zentorch")


def missing(package: str) -> str | None:
    """That a package is not here, and which extra brings it; None where it is."""
    if importlib.util.find_spec(package) is not None:
        return None
    extra = EXTRAS.get(package)
    how = f': pip install "bert_fast[{extra}]"' if extra else ""
    if package in ALONE:
        how = f": pip install {package}"
    return f"the package {package} is not installed{how}"


def require(package: str, purpose: str) -> None:
    """
    Raises:
        ImportError: the package that ``purpose`` needs is missing, and which extra brings it.
    """
    if (reason := missing(package)) is not None:
        raise ImportError(f"{purpose} needs {package}; {reason}")


def can_draw(purpose: str) -> bool:
    """Whether matplotlib is here; where it is not, a warning says that no picture is drawn."""
    if (reason := missing("matplotlib")) is None:
        return True
    warnings.warn(f"{purpose} is not drawn: {reason}", stacklevel=2)
    return False
