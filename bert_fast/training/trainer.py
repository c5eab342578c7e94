"""The loop of ``bert-fast finetune``: steps, a judgement after each epoch, checkpoints.

One step is one batch of the whole group, of which every process computes its own part with the
weight that the part has in the batch's mean loss: so two processes give the numbers of one, up to
rounding. Nothing random is carried from step to step, so a resumed run gives the numbers of an
unbroken one, on the CPU bit for bit.
"""

import json
import math
import time

import numpy as np
import torch

from bert_fast.embeddings.tokenizer import batches_by_tokens
from bert_fast.files import atomic_path
from bert_fast.text import DataError
from bert_fast.training.optim import parameter_groups, warmup_then_linear_decay
from bert_fast.training.processes import cut, dropout_seed


class Trainer:
    """A run of ``settings`` over the features of the training rows. ``records``: of each epoch.
    ``best``: the number of the epoch whose weights the model is left with."""

    def __init__(self, settings, group, tuned, features, rng):
        self.settings, self.group, self.tuned = settings, group, tuned
        task, model = tuned.task, tuned.model
        # A window without a word's first token has nothing to learn from: alone its loss is 0 / 0.
        self.features = [f for f in features if task.weight(f) > 0]
        if not self.features:
            raise DataError(f"{settings.train}: no row has a label that counts")
        self.weights = [task.weight(f) for f in self.features]
        lengths = np.array([task.tokens(f) for f in self.features])
        orders = (rng.permutation(len(lengths)) for _ in range(settings.epochs or task.epochs))
        self.epochs = [
            list(batches_by_tokens(lengths, settings.batch_tokens, order=order)) for order in orders
        ]
        self.steps = sum(map(len, self.epochs))
        # Some families' models have parameters that a task does not use.
        self.parallel = group.replicate(model, find_unused_parameters=True)
        lr = settings.lr or task.lr
        self.optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=lr)
        self.schedule = warmup_then_linear_decay(
            self.optimizer, round(settings.warmup * self.steps), self.steps
        )
        self.step = self.epoch = self.place = 0  # place: of the next batch in its epoch
        self.records, self.losses, self.seconds = [], [], 0.0
        self.best, self.highest, self.kept = len(self.epochs), -math.inf, None

    def train(self, judged, save, progress):
        """Trains to the end, judging by the examples ``judged``; ``save()`` is called when a
        checkpoint is due, ``progress(step, steps, loss)`` after each step."""
        every = self.settings.save_every
        while self.epoch < len(self.epochs) and not self._out_of_patience():
            batches = self.epochs[self.epoch]
            while self.place < len(batches):
                began = time.perf_counter()
                self.losses.append(self._step(batches[self.place]))
                self.seconds += time.perf_counter() - began
                self.place, self.step = self.place + 1, self.step + 1
                progress(self.step, self.steps, self.losses[-1])
                if every and self.step % every == 0:
                    save()
            self._end_epoch(judged)
            save()
        if self.kept is not None and self.best != self.epoch:
            self.tuned.model.load_state_dict(self.kept)

    def predict(self, examples):
        """A prediction an example, each process predicting its part of them."""
        size = self.group.size
        found = [None] * len(examples)
        for rank, part in enumerate(self.group.gather(
            self.tuned.predict(examples[self.group.rank :: size])
        )):  # fmt: skip
            found[rank::size] = part
        return found

    def _step(self, batch):
        """One optimizer step; its loss."""
        group, settings, model = self.group, self.settings, self.tuned.model
        own = batch[cut(slice(0, len(batch)), group.size)[group.rank]]
        share = self._weight(own) / self._weight(batch)
        dropout_seed(settings.seed, self.step, group.rank)
        # Without a part of its own a process computes a row that counts for nothing.
        inputs = self.tuned.batch([self.features[i] for i in own or batch[:1]], labelled=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=inputs["input_ids"].is_cuda):
            loss = self.tuned.task.loss(self.parallel, inputs) * share
        self.optimizer.zero_grad(set_to_none=True)
        (loss * group.size).backward()  # exchanged gradients are means
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        if not torch.isfinite(norm):
            raise ValueError(
                f"step {self.step + 1}: the gradient's norm is {norm.item()}: lower lr"
            )
        self.optimizer.step()
        self.schedule.step()
        return group.sum(loss.detach()).item()

    def _weight(self, some):
        return sum(self.weights[i] for i in some)

    def _end_epoch(self, judged):
        self.epoch, self.place = self.epoch + 1, 0
        record = {"epoch": self.epoch, "step": self.step, "loss": float(np.mean(self.losses))}
        self.records.append(record)
        self.losses = []
        if self.settings.keep == "last":
            return
        record |= (figures := self.tuned.task.judge(judged, self.predict(judged)))
        figure = float(next(iter(figures.values())))  # of every task: more is better
        if self.kept is None or figure > self.highest:
            self.best, self.highest = self.epoch, figure
            weights = self.tuned.model.state_dict()
            self.kept = {name: w.to("cpu", copy=True) for name, w in weights.items()}

    def _out_of_patience(self):
        patience = self.settings.patience
        return patience is not None and self.epoch - self.best >= patience

    def save(self, path, about):
        """One file, all or nothing, is what a resumed run starts from."""
        state = {
            "model": self.tuned.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(), "step": self.step, "epoch": self.epoch,
            "place": self.place, "losses": self.losses, "seconds": self.seconds,
            "records": json.dumps(self.records), "best": self.best, "highest": self.highest,
            "kept": self.kept,
        }  # fmt: skip
        with atomic_path(path) as written:
            torch.save(state | about, written)

    def load(self, state):
        """Goes on from what :meth:`save` wrote."""
        self.tuned.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.records = json.loads(state["records"])
        for name in ("step", "epoch", "place", "losses", "seconds", "best", "highest", "kept"):
            setattr(self, name, state[name])
