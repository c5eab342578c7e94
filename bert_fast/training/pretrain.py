"""``bert-fast pretrain``: a masked language model, with next-sentence prediction or without, from
plain text.

One step is one batch of the whole group: every process reads and computes its own part of it. So
the same text, seed and batch give the same losses on any number of processes, up to rounding; and a
run that was killed goes on from its last checkpoint to the same losses, on the CPU bit for bit.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from bert_fast.embeddings.tokenizer import load_tokenizer
from bert_fast.files import atomic_path
from bert_fast.models.config import BertConfig
from bert_fast.models.heads import BertForMaskedLM, BertForPreTraining
from bert_fast.training.corpus import Corpus, PairSampler, SequenceSampler, prepare, unigram_entropy
from bert_fast.training.metrics import plot, read_metrics
from bert_fast.training.optim import OPTIMIZERS, parameter_groups, warmup_then_linear_decay
from bert_fast.training.options import add_options, option
from bert_fast.training.processes import BINDING, Group, cut, dropout_seed, read_state
from bert_fast.training.tokens import read_tokens


@dataclass
class Settings:
    """What a run consists of; the command line's options, by the same names."""

    text: list = option("text files, one sentence per line, blank lines between documents")
    out: str = option("directory for the checkpoint, tokenizer, metrics and curves")
    tokenizer: str | None = option(
        "a directory with tokenizer.json or vocab.txt; default: trained on the text", None
    )
    init: str | None = option(
        "start from the weights and tokenizer of this Hugging Face checkpoint", None
    )
    vocab_size: int = option("vocabulary of a tokenizer trained on the text", 8192)
    layers: int = option("layers of a new model", 4)
    hidden: int = option("hidden size of a new model", 256)
    heads: int = option("attention heads of a new model", 4)
    intermediate: int | None = option(
        "feed-forward size of a new model (default: 4 x hidden)", None
    )
    dropout: float = option("dropout of a new model", 0.1)
    max_length: int = option("tokens per sequence", 128)
    batch_tokens: int = option("tokens per step, of all processes together", 4096)
    accumulate: int = option("parts that each process computes its step in, for less memory", 1)
    steps: int = option("optimizer steps in total", 1000)
    optimizer: str = option("the optimizer", "adamw", choices=sorted(OPTIMIZERS))
    lr: float = option("highest learning rate", 0.0005)
    warmup: float = option("share of the steps that warm up", 0.1)
    weight_decay: float = option("weight decay of matrices", 0.01)
    clip: float = option("gradients are clipped to this norm", 1.0)
    no_next_sentence: bool = option("learn masked words alone: a BertForMaskedLM", False)
    whole_words: bool = option("mask whole words instead of word pieces", False)
    held_out: float = option("share of the documents kept for testing", 0.05)
    checkpoint_activations: bool = option(
        "keep each layer's input alone: less memory, more time", False
    )
    save_every: int = option("steps between checkpoints", 100)
    seed: int = option("random seed", 0)
    device: str = option("auto, cpu or cuda", "auto")
    shard: bool = option("shard the model (FSDP2) instead of replicating it (DDP)", False)
    resume: bool = option("resume from the checkpoint in --out", False)

    def __post_init__(self):
        for name in ("vocab_size", "layers", "hidden", "heads", "batch_tokens", "accumulate",
                     "steps", "save_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_length < 8:
            raise ValueError(f"max_length must be at least 8, not {self.max_length}")
        for name in ("warmup", "held_out", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}")


def pretrain(settings, progress=None):
    """Trains as ``settings`` say; returns the last held-out figures, or None where nothing is held
    out. ``progress(step, record)`` is called after each step.

    Raises:
        ValueError, OSError: naming the file or setting, before training begins.
    """
    with Group.join(settings.device) as group:
        return _Run(settings, group).train(progress or (lambda step, record: None))


class _MaskedWords(BertForMaskedLM):
    """Masked words alone: the loss, and how many words got their highest score."""

    def forward(self, *args, labels, **kwargs):
        hidden = self.bert(*args, **kwargs).last_hidden_state
        predictions = self.cls.predictions
        return predictions.loss(hidden, predictions.weight(self.bert.embeddings), labels)


class _Run:
    def __init__(self, settings, group):
        self.pairs = not settings.no_next_sentence
        self.rows = "pairs" if self.pairs else "sequences"  # what a batch consists of
        self.settings, self.group = settings, group
        self.out = Path(settings.out)
        self.state_path = self.out / "training_state.pt"
        self.metrics_path = self.out / "metrics.jsonl"
        if not settings.resume and self.state_path.exists():
            raise ValueError(f"{self.out} holds a run already; --resume goes on with it")
        least = 2 if self.pairs else 1
        # By one process for all: two trainings of a tokenizer may break ties differently.
        group.first(
            prepare, self.out, settings.text, settings.resume, least,
            settings.tokenizer or settings.init, settings.vocab_size,
        )  # fmt: skip
        tokens, self.inputs = read_tokens(self.out / "tokens")
        self.corpus = Corpus(tokens, load_tokenizer(self.out))
        train, held_out = self.corpus.split(settings.held_out, least)
        self.sampler = (PairSampler if self.pairs else SequenceSampler)(
            self.corpus, train, settings.max_length, settings.batch_tokens, settings.seed,
            whole_words=settings.whole_words,
        )  # fmt: skip
        self.held_out = self._held_out(held_out)
        counts = torch.from_numpy(self.corpus.counts(train, group.rank, group.size))
        self.entropy = unigram_entropy(group.sum(counts.to(group.device)).cpu().numpy())
        torch.manual_seed(settings.seed)
        self.model = self._new_model().to(group.device)
        self.model.bert.gradient_checkpointing = settings.checkpoint_activations
        self.step = self.epoch = self.place = 0  # place: of the next batch in its epoch
        self.tested = None  # the last record with held-out figures
        self.parallel = self._parallel()
        groups = parameter_groups(self.model, settings.weight_decay)
        self.optimizer = OPTIMIZERS[settings.optimizer](groups, lr=settings.lr)
        self.schedule = warmup_then_linear_decay(
            self.optimizer, round(settings.warmup * settings.steps), settings.steps
        )
        if self.state_path.is_file():
            self._load()
        elif group.rank == 0:  # killed before its first checkpoint, if anything was here
            self.metrics_path.unlink(missing_ok=True)

    def _held_out(self, documents):
        """(sampler, rows, slices) of the held-out documents, the same every time; None where there
        are none, or (with a warning) where they make no rows."""
        sampler = dataclasses.replace(self.sampler, documents=documents, seed=2**31)
        rows, slices = sampler.epoch(0)
        if slices:
            return sampler, rows, slices[:64]
        if len(documents):
            warnings.warn(f"the held-out documents make no {self.rows}: nothing is tested",
                          stacklevel=2)  # fmt: skip
        return None

    def _new_model(self):
        s, kind = self.settings, BertForPreTraining if self.pairs else _MaskedWords
        if s.init:
            model = kind.from_pretrained(s.init, torch.float32).train()
            config = model.config
        else:
            config = BertConfig(
                vocab_size=self.corpus.vocab_size, hidden_size=s.hidden, num_hidden_layers=s.layers,
                num_attention_heads=s.heads, intermediate_size=s.intermediate or 4 * s.hidden,
                max_position_embeddings=s.max_length, hidden_dropout_prob=s.dropout,
                attention_probs_dropout_prob=s.dropout, pad_token_id=self.corpus.pad,
            )  # fmt: skip
            model = kind(config)
        if s.max_length > config.max_position_embeddings:
            raise ValueError(f"max_length is {s.max_length}; the model has "
                             f"{config.max_position_embeddings} positions")  # fmt: skip
        if self.corpus.vocab_size > config.vocab_size:
            raise ValueError(f"the tokenizer has {self.corpus.vocab_size} tokens, the model "
                             f"{config.vocab_size}")  # fmt: skip
        return model

    def _parallel(self):
        if self.settings.shard:
            from torch.distributed.fsdp import fully_shard

            if self.group.size == 1:
                raise ValueError("shard needs several processes: torchrun --nproc-per-node ...")
            for layer in self.model.bert.layers:
                fully_shard(layer)
            return fully_shard(self.model)
        return self.group.replicate(self.model)

    # -- training --

    def train(self, progress):
        settings, epoch = self.settings, None
        while self.step < settings.steps:
            if epoch != self.epoch:
                rows, slices = self.sampler.epoch(self.epoch)
                epoch = self.epoch
                if not slices:
                    raise ValueError(f"the text makes no {self.rows}")
            record = self._step(rows, slices[self.place])
            self.place += 1
            if self.place == len(slices):
                self.epoch, self.place = self.epoch + 1, 0
            self.step += 1
            record = {"step": self.step, **record}
            save = self.step % settings.save_every == 0 or self.step == settings.steps
            if save and self.held_out:
                self.tested = record = record | self.evaluate()
            if self.group.rank == 0:
                with open(self.metrics_path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            progress(self.step, record)
            if save:
                self._save()
        return self.tested

    def _step(self, rows, whole):
        """One optimizer step; its figures. Every process's part weighs what it has of the step's
        masked tokens and pairs, so that cutting a batch up changes nothing but rounding."""
        group, began = self.group, time.perf_counter()
        mine = self._own(self.sampler, rows, whole, self.epoch, self.settings.accumulate)
        masked, count = self._masked(mine), whole.stop - whole.start
        self.optimizer.zero_grad(set_to_none=True)
        figures = torch.zeros(5, dtype=torch.float64, device=group.device)
        for i, (batch, rows_of) in enumerate(mine):
            dropout_seed(self.settings.seed, self.step, group.rank, i)
            last = i == len(mine) - 1
            with self._without_exchange(not last):
                shares = (batch.masked / masked, rows_of / count) if rows_of else (0.0, 0.0)
                loss, found = self._loss(self.parallel, batch, *shares)
                (loss * group.size).backward()  # exchanged gradients are means
            if rows_of:
                figures += found
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not math.isfinite(norm):
            raise ValueError(f"step {self.step + 1}: the gradient's norm is {norm}: lower lr")
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        lm, right, tokens, following, right_following = group.sum(figures).tolist()
        record = {
            "epoch": self.epoch, "loss": lm + following, "masked_lm_loss": lm,
            "masked_lm_accuracy": right / masked, "gradient_norm": float(norm), "lr": rate,
            "tokens_per_second": tokens / (time.perf_counter() - began),
        }  # fmt: skip
        if self.pairs:
            record["next_sentence_loss"] = following
            record["next_sentence_accuracy"] = right_following / count
        return record

    def _own(self, sampler, rows, whole, epoch, parts=1):
        """This process's parts of a batch: (what it holds, how many of its rows count). Where there
        are more parts than rows, some hold a row that counts for nothing."""
        own = cut(whole, self.group.size * parts)[self.group.rank * parts :][:parts]
        filled = [part if part.stop > part.start else slice(whole.start, whole.start + 1)
                  for part in own]  # fmt: skip
        return [(sampler.batch(rows, some, epoch), part.stop - part.start)
                for some, part in zip(filled, own, strict=True)]  # fmt: skip

    def _masked(self, mine):
        """How many tokens are to be predicted, in all processes' parts."""
        masked = sum(batch.masked for batch, rows_of in mine if rows_of)
        return int(self.group.sum(torch.tensor(masked, device=self.group.device)))

    def _without_exchange(self, wanted):
        if wanted and isinstance(self.parallel, DistributedDataParallel):
            return self.parallel.no_sync()
        return contextlib.nullcontext()

    def _loss(self, model, batch, masked_share, pair_share):
        """This part's loss, and its (masked_lm_loss, right, tokens, next_sentence_loss, right); the
        last two are 0 where masked words are all."""
        batch = batch.to(self.group.device)
        inputs = {
            "token_type_ids": batch.token_type_ids, "cu_seqlens": batch.cu_seqlens,
            "max_seqlen": batch.max_seqlen, "labels": batch.labels,
        }  # fmt: skip
        if self.pairs:
            inputs["next_sentence_label"] = batch.next_sentence_label
        gpu = self.group.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            out = model(batch.input_ids, **inputs)
        if self.pairs:
            words, right = out.masked_lm_loss, out.masked_lm_correct
            following = out.next_sentence_loss * pair_share
            guess = out.seq_relationship_logits.argmax(1) == batch.next_sentence_label
            right_following = guess.sum()
        else:
            words, right = out
            following = right_following = words.new_zeros(())
        words = words * masked_share
        tokens = right.new_full((), len(batch.input_ids))
        figures = (words, right, tokens, following, right_following)
        return words + following, torch.stack([figure.detach().double() for figure in figures])

    @torch.no_grad()
    def evaluate(self):
        """Loss and accuracy on held-out documents: the same rows and masks every time."""
        sampler, rows, slices = self.held_out
        self.model.eval()
        total, masked, count = 0.0, 0, 0
        for some in slices:
            mine = self._own(sampler, rows, some, 0)
            masked, count = masked + self._masked(mine), count + some.stop - some.start
            for batch, rows_of in mine:
                _, found = self._loss(self.parallel, batch, batch.masked, rows_of)
                total = total + (found if rows_of else torch.zeros_like(found))
        self.model.train()
        lm, right, _, following, right_following = self.group.sum(total).tolist()
        record = {
            "held_out_masked_lm_loss": lm / masked, "held_out_masked_lm_accuracy": right / masked,
            f"held_out_{self.rows}": count, "unigram_entropy": self.entropy,
        }  # fmt: skip
        if self.pairs:
            record["held_out_next_sentence_loss"] = following / count
            record["held_out_next_sentence_accuracy"] = right_following / count
        return record

    # -- checkpoints --

    def _binding(self):
        return {name: getattr(self.settings, name) for name in BINDING}

    def _weights(self):
        """Model and optimizer, whole, whatever the sharding."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_state_dict(self.model, self.optimizer, options=options)

    def _save(self):
        """One file, all or nothing, is what a resumed run starts from; metrics past it are cut."""
        model, optimizer = self._weights()
        if self.group.rank:
            return
        with atomic_path(self.state_path) as path:
            torch.save({
                "model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict(),
                "step": self.step, "epoch": self.epoch, "place": self.place,
                "settings": self._binding(), "inputs": self.inputs,
            }, path)  # fmt: skip
        self._write_results(model)

    def _write_results(self, weights):
        with torch.device("meta"):
            kind = BertForPreTraining if self.pairs else BertForMaskedLM
            whole = kind(self.model.config)
        whole.load_state_dict(weights, assign=True)
        whole.save_pretrained(self.out)
        plot(read_metrics(self.metrics_path, self.step), self.out / "curves.png")

    def _load(self):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        state = read_state(self.state_path, self._binding())
        if state.get("inputs", self.inputs) != self.inputs:
            raise ValueError(f"--resume: {self.out} was trained on another text, or tokenizer")
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"],
            optim_state_dict=state["optimizer"], options=StateDictOptions(full_state_dict=True),
        )  # fmt: skip
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.epoch, self.place = state["step"], state["epoch"], state["place"]
        records = read_metrics(self.metrics_path, self.step)
        self.tested = next((r for r in reversed(records) if "unigram_entropy" in r), None)
        if self.group.rank == 0:
            with atomic_path(self.metrics_path) as path:
                lines = (json.dumps(record) + "\n" for record in records)
                Path(path).write_text("".join(lines), encoding="utf-8")


def command(args):
    """Pre-train a BERT on plain text; several processes by ``torchrun -m bert_fast.cli``."""
    names = [f.name for f in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(args, name) for name in names})
    if int(os.environ.get("RANK", 0)):
        pretrain(settings)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(), TextColumn("{task.completed}/{task.total} {task.description}")
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=settings.steps)

        def show(step, record):
            said = f"loss {record['loss']:.3f}, words {record['masked_lm_accuracy']:.0%}, "
            if "next_sentence_accuracy" in record:
                said += f"next sentence {record['next_sentence_accuracy']:.0%}, "
            said += f"{record['tokens_per_second']:,.0f} tokens/s"
            bar.update(task, completed=step, description=said)

        last = pretrain(settings, show)
    if last is not None:
        rows = "sequences" if settings.no_next_sentence else "pairs"
        said = (
            f"held out, {last[f'held_out_{rows}']} {rows}: masked words "
            f"{last['held_out_masked_lm_loss']:.3f} nats (unigram entropy "
            f"{last['unigram_entropy']:.3f}), {last['held_out_masked_lm_accuracy']:.1%} right"
        )
        if not settings.no_next_sentence:
            said += f"; next sentence {last['held_out_next_sentence_accuracy']:.1%} right"
        print(said)
    print(f"{settings.out}: model.safetensors, tokenizer.json, metrics.jsonl, curves.png")


def add_parser(commands):
    sub = commands.add_parser("pretrain", help=command.__doc__, description=command.__doc__)
    add_options(sub, Settings)
    sub.set_defaults(function=command)
