"""A fine-tuned model with its tokenizer and its task: rows in, predictions out."""

import json
from pathlib import Path

import torch

from bert_fast.embeddings.tokenizer import batches_by_tokens, load_tokenizer_and_settings
from bert_fast.files import CheckpointError
from bert_fast.models.graphs import positions
from bert_fast.training import tasks
from bert_fast.training.models import load_model, takes_types


class Tuned:
    """A model with a task's head, its tokenizer, and its task: what ``finetune`` leaves behind."""

    def __init__(self, task, model, directory, max_length=None):
        """``directory``: of the tokenizer."""
        self.task, self.model = task, model
        self.tokenizer, said = load_tokenizer_and_settings(directory)
        self.tokenizer.no_padding()
        self.given_truncation, self.side = self.tokenizer.truncation, said.truncation_side
        longest = positions(model)
        max_length = max_length or min(128, longest, said.limit)
        if max_length > longest:
            raise ValueError(f"max_length is {max_length}; the model has {longest} positions")
        self.pad, self.takes_types = model.config.pad_token_id or 0, takes_types(model)
        self.max_length = max_length

    @classmethod
    def from_pretrained(cls, directory, max_length=None, device="cpu", dtype=None):
        """A directory of ``finetune``'s, or of Hugging Face's with a head for one of the tasks."""
        directory = Path(directory)
        try:
            values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            (architecture,) = values["architectures"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{directory}: config.json names no model: {error!r}") from error
        kinds = [kind for kind in tasks.TASKS.values() if _does(kind, architecture)]
        if not kinds:
            raise CheckpointError(f"{directory} holds a {architecture}, which is no task's model")
        on_cpu = torch.device(device).type == "cpu"
        if dtype is not None and not on_cpu:
            raise ValueError(f"--dtype {dtype} is for the CPU: give --device cpu")
        model = load_model(kinds[0].model, directory, prepack=on_cpu, dtype=dtype)
        # A single logit is a score, whatever it was trained for: alone it has no rival.
        single = "regression" if getattr(model.config, "num_labels", 2) == 1 else tasks.SINGLE
        problem = values.get("problem_type") or single
        kinds = [kind for kind in kinds if kind.problem_type in (None, problem)]
        if not kinds:
            raise CheckpointError(f"{directory}: problem_type {problem!r} is no task's")
        task = kinds[0]()
        task.load(directory, model.config)
        return cls(task, model.to(device).eval(), directory, max_length)

    def save_tokenizer(self, path):
        """Writes tokenizer.json, which cuts where the one that was loaded does."""
        self.tokenizer.no_truncation()
        if self.given_truncation is not None:
            self.tokenizer.enable_truncation(**self.given_truncation)
        self.tokenizer.save(str(path))

    def features(self, examples):
        return self.task.features(self.tokenizer, examples, self.max_length, self.side)

    @torch.inference_mode()
    def predict(self, examples, batch_tokens=8192):
        """A prediction an example, as the task has it."""
        was_training, features = self.model.training, self.features(examples)
        self.model.eval()
        outputs = [None] * len(features)
        for some in batches_by_tokens([len(f.ids) for f in features], batch_tokens):
            batch = [features[i] for i in some]
            found = self.task.run(self.model, self.batch(batch), [len(f.ids) for f in batch])
            for i, output in zip(some, found, strict=True):
                outputs[i] = output
        self.model.train(was_training)
        return self.task.predictions(examples, features, outputs)

    def batch(self, features, labelled=False):
        """The model's arguments. Masks stay on the CPU, where padding is counted at once."""
        seqlen = max(len(feature.ids) for feature in features)
        ids = torch.full((len(features), seqlen), self.pad, dtype=torch.int64)
        types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, feature in enumerate(features):
            length = len(feature.ids)
            ids[row, :length] = torch.tensor(feature.ids)
            types[row, :length] = torch.tensor(feature.types)
            mask[row, :length] = 1
        labels = self.task.label_tensors(features, seqlen) if labelled else {}
        device = next(self.model.parameters()).device
        inputs = {"input_ids": ids, "attention_mask": mask, **labels}
        if self.takes_types:
            inputs["token_type_ids"] = types
        return {
            name: value if name.endswith("mask") else value.to(device, non_blocking=True)
            for name, value in inputs.items()
        }


def _does(kind, architecture):
    """Whether an architecture of any family is that of a task's model."""
    head = kind.model.__name__.removeprefix("Bert")
    return architecture == head or (head.startswith("For") and architecture.endswith(head))
