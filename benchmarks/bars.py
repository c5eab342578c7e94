"""make bench: the speed bars, each a ratio to peers measured in the same run.

Contestants of a row run in turn, round after round (A B C A B C ...), so that whatever the machine
does meanwhile hits all of them; a row's number is the median of its rounds. Before anything is
timed its result is compared with Hugging Face's. A peer that is not installed is named, not
required. "GEMMs alone" are the row's matrix products by torch.mm into memory that is there already:
what a model that added nothing to MKL's sgemm would take.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import platform
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table

import bert_fast
from benchmarks import data
from bert_fast import _C, ops

ABSENT = {}  # peer -> why it is not in the tables


@dataclass
class Row:
    """One line of the table: what is timed, and the least ratio of a peer's time to ours."""

    work: str
    runs: dict  # name -> function; the first is ours
    bars: dict = field(default_factory=dict)  # name -> least ratio
    pause: bool = False
    results: dict = field(default_factory=dict)

    def measure(self, rounds):
        for run in self.runs.values():
            run()
        times = {name: [] for name in self.runs}
        for _ in range(rounds):
            for name, run in self.runs.items():
                if self.pause:  # the last one's threads may still be spinning
                    time.sleep(0.05)
                begin = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - begin) * 1e3)
        for name, ms in times.items():
            ordered = sorted(ms)
            quarter = len(ms) // 4
            self.results[name] = {
                "ms": statistics.median(ms),
                "spread": [ordered[quarter], ordered[-1 - quarter]],
            }

    def ratio(self, name):
        ours = next(iter(self.results.values()))["ms"]
        return self.results[name]["ms"] / ours


def batch(size, seqlen, share, seed=0):
    """Ids and mask of ``size`` rows whose lengths spread evenly around ``share`` of ``seqlen``."""
    generator = torch.Generator().manual_seed(seed)
    shortest = round((2 * share - 1) * seqlen)
    lengths = torch.linspace(max(shortest, 1), seqlen, size).round().long()
    mask = (torch.arange(seqlen) < lengths[:, None]).long()
    ids = torch.randint(1000, 30000, (size, seqlen), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def gemms(tokens, config):
    """The four products of every layer, on ``tokens`` rows."""
    hidden, wide = config.hidden_size, config.intermediate_size
    x, y = torch.randn(tokens, hidden), torch.randn(tokens, wide)
    shapes = [(3 * hidden, x), (hidden, x), (wide, x), (hidden, y)]
    products = [(i, torch.randn(n, i.shape[1]), torch.empty(tokens, n)) for n, i in shapes]

    def run():
        for _ in range(config.num_hidden_layers):
            for i, weight, out in products:
                torch.mm(i, weight.t(), out=out)

    return run


# ------------------------------------------------------------------------------------------------
# Peers: each takes a Hugging Face directory and inputs, and returns a function of no arguments that
# gives last_hidden_state.
# ------------------------------------------------------------------------------------------------


def hugging_face(directory, inputs, implementation="sdpa"):
    model = transformers.AutoModel.from_pretrained(
        directory, attn_implementation=implementation, dtype=torch.float32
    ).eval()
    return lambda: model(**inputs).last_hidden_state


def compiled(directory, inputs):
    model = transformers.AutoModel.from_pretrained(
        directory, attn_implementation="sdpa", dtype=torch.float32
    ).eval()
    model = torch.compile(model)
    return lambda: model(**inputs).last_hidden_state


class _ForExport(torch.nn.Module):
    def __init__(self, directory):
        super().__init__()
        self.model = transformers.AutoModel.from_pretrained(
            directory, attn_implementation="eager", dtype=torch.float32
        ).eval()

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask).last_hidden_state


def onnx_runtime(directory, inputs):
    """The default export, with the transformer optimizer's fusions on top."""
    import onnxruntime
    from onnxruntime.transformers import optimizer

    model = _ForExport(directory)
    config = model.model.config
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        torch.onnx.export(model, tuple(inputs.values()), path, input_names=list(inputs))
        fused = optimizer.optimize_model(
            str(path), "bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
        )
        best = path.with_suffix(".fused.onnx")
        fused.save_model_to_file(str(best), use_external_data_format=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        try:
            session = onnxruntime.InferenceSession(best, options, providers=providers)
        except Exception:  # it trips over its own fused graph of MiniLM: then the plain export
            session = onnxruntime.InferenceSession(path, options, providers=providers)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    names = {given.name for given in session.get_inputs()}
    arrays = {name: array for name, array in arrays.items() if name in names}
    return lambda: torch.from_numpy(session.run(None, arrays)[0])


def openvino(directory, inputs):
    import openvino

    model = openvino.convert_model(_ForExport(directory), example_input=dict(inputs))
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    engine = openvino.compile_model(model, "CPU", options)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    return lambda: torch.from_numpy(engine(arrays)[0])


def ctranslate2(directory, inputs):
    """Unpads by itself, as we do."""
    import ctranslate2

    with tempfile.TemporaryDirectory() as scratch:
        converter = ctranslate2.converters.TransformersConverter(str(directory))
        converted = converter.convert(str(Path(scratch) / "model"))
        encoder = ctranslate2.Encoder(
            converted, compute_type="float32", intra_threads=torch.get_num_threads()
        )
    lengths = inputs["attention_mask"].sum(1).tolist()
    ids = [row[:n].tolist() for row, n in zip(inputs["input_ids"], lengths, strict=True)]

    def run():
        import numpy as np

        output = encoder.forward_batch(ids).last_hidden_state
        return torch.from_numpy(np.array(output))

    return run


PEERS = {
    "HF eager": (None, lambda d, i: hugging_face(d, i, "eager")),
    "HF sdpa": (None, hugging_face),
    "torch.compile": (None, compiled),
    "ONNX Runtime": ("onnxruntime", onnx_runtime),
    "OpenVINO": ("openvino", openvino),
    "CTranslate2": ("ctranslate2", ctranslate2),
}


def peers(directory, inputs, names, wanted):
    """The peers that are installed and right: those off by more than fp32's share are left out."""
    real, found = inputs["attention_mask"].bool(), {}
    for name in names:
        package, make = PEERS[name]
        if package and importlib.util.find_spec(package) is None:
            ABSENT[name] = "not installed"
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run = make(directory, inputs)
                error = (run()[real] - wanted[real]).abs().max().item()
        except Exception as problem:
            ABSENT[name] = (
                f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:90]}"
            )
            continue
        if not error < 1e-3:
            ABSENT[name] = f"wrong: differs from Hugging Face by {error:.1e}"
            continue
        found[name] = run
    return found


# ------------------------------------------------------------------------------------------------
# The rows
# ------------------------------------------------------------------------------------------------


def model_row(work, directory, inputs, bars, names, limit=2e-5):
    ours = bert_fast.BertModel.from_pretrained(directory).prepack()
    wanted = hugging_face(directory, inputs)()
    difference = ((ours(**inputs)[0] - wanted) * inputs["attention_mask"][..., None]).abs().max()
    if not difference < limit:
        raise SystemExit(f"{work}: differs from Hugging Face by {difference:.1e}: nothing is timed")
    tokens = int(inputs["attention_mask"].sum())
    share = tokens / inputs["attention_mask"].numel()
    runs = {"bert_fast": lambda: ours(**inputs), **peers(directory, inputs, names, wanted)}
    runs["GEMMs alone"] = gemms(tokens, ours.config)
    if _C.linear_available():  # what a processor without AMX would be left with
        plain = bert_fast.BertModel.from_pretrained(directory)
        runs["ours without AMX"] = lambda: plain(**inputs)
    return Row(
        f"{work}, {share:.0%} real; largest difference {difference:.1e}", runs, bars, pause=True
    )


def layer_norm_row():
    x, residual = torch.randn(2, 1024, 768)
    vectors = torch.randn(3, 768)
    out = torch.empty_like(x)
    runs = {
        "bert_fast": lambda: ops.layer_norm(
            x, vectors[0], vectors[1], residual=residual, linear_bias=vectors[2], out=out
        ),
        "F.layer_norm(x + b + r)": lambda: F.layer_norm(
            x + vectors[2] + residual, (768,), vectors[0], vectors[1], 1e-12
        ),
    }
    torch.testing.assert_close(*(run() for run in runs.values()), rtol=1e-4, atol=1e-4)
    return Row("bias + residual + layer-norm, 1024 x 768", runs, {"F.layer_norm(x + b + r)": 1.5})


def attention_row():
    lengths = [13, 128, 57, 99, 128, 31, 77, 120]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    cu_seqlens = torch.tensor([0, *ends]).int()
    qkv, out = torch.randn(ends[-1], 3, 12, 64), torch.empty(ends[-1], 12, 64)
    spans = list(zip([0, *ends[:-1]], ends, strict=True))

    def loop():
        parts = [qkv[a:b].permute(1, 2, 0, 3)[:, None] for a, b in spans]
        return [F.scaled_dot_product_attention(*part) for part in parts]

    runs = {
        "bert_fast": lambda: ops.attention_qkv(qkv, cu_seqlens, out=out),
        "loop of sdpa": loop,
    }
    wanted = torch.cat([part[0].transpose(0, 1) for part in loop()])
    torch.testing.assert_close(runs["bert_fast"](), wanted, rtol=1e-4, atol=1e-5)
    return Row("attention, lengths 13 to 128, 12 heads of 64", runs, {"loop of sdpa": 1.2})


def train_row(directory, inputs):
    """Forward, backward, no optimizer; both without dropout, so that the gradients can be checked,
    then timed with the dropout of the checkpoint's config."""
    theirs = transformers.AutoModel.from_pretrained(directory, attn_implementation="sdpa")
    ours = bert_fast.BertModel.from_pretrained(directory)
    target = torch.randn(*inputs["input_ids"].shape, ours.config.hidden_size)
    target = target * inputs["attention_mask"][..., None]

    def step(model):
        def run():
            model.zero_grad()
            with torch.inference_mode(False), torch.enable_grad():
                (model(**inputs)[0] * target).sum().backward()

        return run

    ours.eval(), theirs.eval()
    step(ours)(), step(theirs)()
    a, b = ours.embeddings.word.weight.grad, theirs.embeddings.word_embeddings.weight.grad
    if not (a - b).norm() < 1e-4 * b.norm():
        raise SystemExit("training step: gradients differ from Hugging Face's: nothing is timed")
    ours.train(), theirs.train()
    share = inputs["attention_mask"].float().mean()
    work = f"training step, BERT-base, 8 x 128, {share:.0%} real, dropout 0.1"
    return Row(work, {"bert_fast": step(ours), "HF sdpa": step(theirs)}, {"HF sdpa": 1.3})


def rows(quick):
    everyone = ["HF sdpa"] if quick else list(PEERS)
    minilm = data.minilm()
    yield model_row(
        "MiniLM-L6, 32 x 128", minilm, batch(32, 128, 0.63),
        {"HF sdpa": 1.75, "CTranslate2": 1.12, "GEMMs alone": 1 / 1.05}, everyone,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as base:
        torch.manual_seed(0)
        # CTranslate2's converter still reads what transformers 5 no longer writes.
        config = transformers.BertConfig(position_embedding_type="absolute")
        transformers.BertModel(config).save_pretrained(base)
        full = {"HF sdpa": 1.35, "ONNX Runtime": 1.0, "GEMMs alone": 1 / 1.05}
        yield model_row("BERT-base, 8 x 128", base, batch(8, 128, 1.0), full, everyone)
        most = {"HF sdpa": 1.9, "GEMMs alone": 1 / 1.05}
        yield model_row("BERT-base, 8 x 128", base, batch(8, 128, 0.65), most, everyone)
        yield layer_norm_row()
        yield attention_row()
        yield train_row(base, batch(8, 128, 0.65))


def environment():
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cpu kernels": _C.cpu_isa() + (" + AMX" if _C.linear_available() else ""),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bert_fast": bert_fast.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--quick", action="store_true", help="Hugging Face sdpa as the only peer")
    options.add_argument("--json", help="also write everything here")
    args = options.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    console = Console(width=110)
    console.print(", ".join(f"{k}: {v}" for k, v in environment().items()))
    measured = []
    with torch.no_grad():
        for row in rows(args.quick):
            small = row.work.startswith(("bias", "attention"))
            row.measure(args.rounds * 20 if small else args.rounds)
            console.print(table(row))
            measured.append({"work": row.work, "bars": row.bars, "results": row.results})
    for name, reason in ABSENT.items():
        console.print(f"not measured: {name}: {reason}")
    if args.json:
        result = {"environment": environment(), "absent": ABSENT, "rows": measured}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(row):
    shown = Table(title=row.work, title_justify="left")
    for column in ("", "ms (median)", "middle half", "time / ours", "bar", ""):
        shown.add_column(column, justify="left" if not column else "right")
    for name, result in row.results.items():
        bar, ratio = row.bars.get(name), row.ratio(name)
        shown.add_row(
            name,
            f"{result['ms']:.2f}",
            "{:.2f} - {:.2f}".format(*result["spread"]),
            f"{ratio:.2f}",
            "" if bar is None else f"{bar:.2f}",
            "" if bar is None else ("met" if ratio >= bar else "missed"),
        )
    return shown


if __name__ == "__main__":
    main()
