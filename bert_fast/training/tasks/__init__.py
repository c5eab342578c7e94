"""What BERT is fine-tuned for, one file a task: how it reads rows, labels tokens or texts, and is
judged. The training loop is not here."""

from bert_fast.text import ROW_FORMATS, DataError, read_rows
from bert_fast.training.tasks.classification import Classification, MultiLabel, Sentiment
from bert_fast.training.tasks.question_answering import QuestionAnswering
from bert_fast.training.tasks.regression import Regression
from bert_fast.training.tasks.tagging import Tagging
from bert_fast.training.tasks.task import SINGLE, Example, Feature, Task
from bert_fast.training.tasks.translation import Translation
from bert_fast.training.tasks.weights import class_weights

__all__ = [
    "ROW_FORMATS",
    "SINGLE",
    "TASKS",
    "Classification",
    "DataError",
    "Example",
    "Feature",
    "MultiLabel",
    "QuestionAnswering",
    "Regression",
    "Sentiment",
    "Tagging",
    "Task",
    "Translation",
    "class_weights",
    "read_rows",
]

TASKS = {
    "classification": Classification,
    "sentiment": Sentiment,
    "multi-label": MultiLabel,
    "regression": Regression,
    "ner": Tagging,
    "qa": QuestionAnswering,
    "translation": Translation,
}
