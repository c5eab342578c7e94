"""Which kernels run: the choice, and the way from tensors to the addresses that kernels take
(``cpu``, ``cuda``; Triton's is ``kernels/``). Nothing here knows an op's gradient or a model."""

from bert_fast.backends import processes  # noqa: F401, for what it registers
from bert_fast.backends.choice import (
    AUTO,
    BACKENDS,
    COMPOSED,
    ONLY_WHERE_MEASURED,
    OPS,
    SUPPORT,
    BackendName,
    BackendUnavailableError,
    Support,
    all_choose,
    choose,
    circumstances,
    import_module,
    interpreted,
    module,
    resolve_device,
    use_backend,
    why_not,
    why_unavailable,
)

__all__ = [
    "AUTO",
    "BACKENDS",
    "COMPOSED",
    "ONLY_WHERE_MEASURED",
    "OPS",
    "SUPPORT",
    "BackendName",
    "BackendUnavailableError",
    "Support",
    "all_choose",
    "choose",
    "circumstances",
    "import_module",
    "interpreted",
    "module",
    "resolve_device",
    "use_backend",
    "why_not",
    "why_unavailable",
]
