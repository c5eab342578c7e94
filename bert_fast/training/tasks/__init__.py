"""What BERT is fine-tuned for, one file a task: how it reads rows, labels tokens or texts, and is
judged. The training loop is not here."""

from bert_fast.training.tasks.task import (
    ROW_FORMATS,
    SINGLE,
    TASKS,
    DataError,
    Example,
    QuestionAnswering,
    Tagging,
    Translation,
)

__all__ = [
    "ROW_FORMATS",
    "SINGLE",
    "TASKS",
    "DataError",
    "Example",
    "QuestionAnswering",
    "Tagging",
    "Translation",
]
