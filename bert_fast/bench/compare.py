"""The same checkpoint on the same texts, by Hugging Face and by us: times, differences, cosines
and the share of nearest neighbours that stay."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bert_fast.bench import quality
from bert_fast.bench.report import OURS
from bert_fast.embeddings.encoder import SentenceEncoder
from bert_fast.extras import can_draw, require

BASELINE = "HF sdpa, sorted"  # Hugging Face's own best


@dataclass
class Row:
    """One implementation: seconds of each round, and what it computed."""

    name: str
    seconds: list
    embeddings: np.ndarray

    @property
    def median(self):
        return statistics.median(self.seconds)


class HuggingFace:
    """Hugging Face's model with our tokens and pooling: batches of ``batch_size`` texts padded to
    their longest, sorted by length first as sentence-transformers does, or in the order given."""

    def __init__(self, directory, encoder, implementation, in_order=False, batch_size=32):
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.AutoModel.from_pretrained(
            directory, attn_implementation=implementation, dtype=torch.float32
        )
        self.model = self.model.eval().to(encoder.device)
        self.encoder, self.in_order, self.batch_size = encoder, in_order, batch_size

    @torch.inference_mode()
    def encode(self, ids):
        out = np.empty((len(ids), self.encoder.model.config.hidden_size), dtype=np.float32)
        device = self.encoder.device
        order = list(range(len(ids)))
        if not self.in_order:
            order.sort(key=lambda i: -len(ids[i]))
        for begin in range(0, len(order), self.batch_size):
            batch = order[begin : begin + self.batch_size]
            lengths = torch.tensor([len(ids[i]) for i in batch])
            padded = torch.zeros(len(batch), int(lengths.max()), dtype=torch.int64)
            for row, i in enumerate(batch):
                padded[row, : len(ids[i])] = torch.from_numpy(ids[i])
            mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
            padded, mask = padded.to(device), mask.to(device)
            hidden = self.model(input_ids=padded, attention_mask=mask).last_hidden_state
            cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
            pooled = self.encoder.pool(hidden[mask.bool()], cu_seqlens.to(device))
            out[batch] = pooled.cpu().numpy()  # waits for the GPU, so that its time counts
        return out


DTYPES = ("float32", "bfloat16", "int8")


def served(directory, dtype, device):
    """Our encoder in one of ``DTYPES``.

    Raises:
        ValueError: the dtype is not one of them, or int8 is asked for on a GPU.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if dtype == "int8" and str(device) != "cpu":
        raise ValueError("--dtype int8 is of the CPU")
    return SentenceEncoder(directory, dtype=dtype, device=device)


def compare(
    directory, texts, rounds=3, batch_tokens=4096, device="cpu", progress=None, dtype="float32"
):
    """Embeds ``texts`` by Hugging Face (eager, sdpa; float32) and by us, in float32 and, where
    another is given, in ``dtype``, ``rounds`` times in turn, after one warm-up on a few texts.
    Tokenization is done once and timed for none. ``progress`` is the console that shows a bar, by
    default stderr where that is a terminal. Returns Rows, ours in ``dtype`` last, Hugging Face's
    best before ours, and the number of tokens.

    Raises:
        ImportError: transformers is not installed.
        ValueError: as ``served`` says.
    """
    require("transformers", "the comparison with Hugging Face")  # before minutes of work
    encoder = served(directory, "float32", device)
    cheaper = None if dtype == "float32" else served(directory, dtype, device)
    ids = encoder.tokenize(texts)
    runners = {
        "HF sdpa, in order": HuggingFace(directory, encoder, "sdpa", in_order=True).encode,
        "HF eager, sorted": HuggingFace(directory, encoder, "eager").encode,
        BASELINE: HuggingFace(directory, encoder, "sdpa").encode,
        OURS: lambda ids: encoder.encode_ids(ids, batch_tokens),
    }
    if cheaper is not None:
        runners[f"{OURS} {dtype}"] = lambda ids: cheaper.encode_ids(ids, batch_tokens)
    rows = {name: Row(name, [], None) for name in runners}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = progress or Console(stderr=True)
    # Drawn between the timings alone: a thread that draws would take time from them.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=(rounds + 1) * len(runners))
        for number in range(rounds + 1):
            for name, runner in runners.items():
                label = f"round {number} of {rounds}" if number else "warm-up"
                bar.update(task, description=f"{label}: {name}", refresh=True)
                begin = time.perf_counter()
                found = runner(ids if number else ids[:64])
                if number:
                    rows[name].seconds.append(time.perf_counter() - begin)
                    rows[name].embeddings = found
                bar.update(task, advance=1, refresh=True)
    return list(rows.values()), sum(map(len, ids))


def report(rows, tokens, plot=None, console=None):
    """Prints the table of times and the largest difference; draws the times to ``plot`` (PNG), or
    warns that matplotlib is missing."""
    console = console or Console()
    ours = rows[-1]
    baseline = next(row for row in rows if row.name == BASELINE)
    cheaper = "" if ours.name == OURS else f" and {ours.name.removeprefix(OURS).strip()}"
    table = Table(title=f"{len(ours.embeddings)} texts, {tokens} real tokens, fp32{cheaper}, "
                  f"{torch.get_num_threads()} threads")  # fmt: skip
    for column in ("", "seconds (median)", "spread", "tokens/s", f"{ours.name} is faster by"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(
            row.name, f"{row.median:.2f}", f"{min(row.seconds):.2f} - {max(row.seconds):.2f}",
            f"{tokens / row.median:,.0f}",
            "" if row is ours else f"{row.median / ours.median:.2f}x",
        )  # fmt: skip
    console.print(table)
    difference = np.abs(ours.embeddings - baseline.embeddings).max()
    console.print(
        f"Largest difference to {baseline.name}, any element of any text: {difference:.1e}"
    )
    cosines = quality.cosines(ours.embeddings, baseline.embeddings)
    console.print(
        f"Cosine to {baseline.name}, mean / 1st percentile / least: {quality.shown(cosines)}"
    )
    if len(ours.embeddings) > 1:
        k = min(10, len(ours.embeddings) - 1)
        shared = quality.recall(ours.embeddings, baseline.embeddings, k)
        console.print(f"Recall of each text's {k} nearest neighbours: {shared:.2%}")
    if plot and can_draw(plot):
        draw(rows, plot)
        console.print(f"Plot: {plot}")
    return float(difference)


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
    bars = axes.barh(
        [row.name for row in rows], [row.median for row in rows],
        color=["#d9480f" if row.name.startswith(OURS) else "#9aa5b8" for row in rows],
    )  # fmt: skip
    axes.bar_label(bars, [f"{row.median:.2f} s" for row in rows], padding=4)
    axes.set_xlabel("seconds, median of the rounds (less is better)")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
