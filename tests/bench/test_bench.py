"""bert-fast bench: wrong results are refused, turns are taken, spreads and files are whole."""

import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch

from bert_fast.bench import changes, lengths, plots, report, run, selection, timing, works
from bert_fast.bench.contestant import Run
from bert_fast.bench.peers import Eager, Gemms, Ours, Torch, peers
from bert_fast.cli import main
from bert_fast.extras import can_draw

SMALL = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = SMALL | {"intermediate_size": 128}
BATCH = ((5, 17, 9),)


def small_works(dtype=torch.float32):
    for backward in (False, True):
        common = {"dtype": dtype, "backward": backward}
        yield works.Attention(**common, lengths=BATCH[0], num_heads=2, head_dim=32)
        yield works.LayerNorm(**common, rows=31, width=48)
        yield works.Gelu(**common, rows=31, width=48)
        yield works.LinearGelu(**common, rows=31, width=48, out_width=64)
        yield works.Layer(**common, batches=BATCH, config_changes=SMALL)
    yield works.Model(dtype, batches=(*BATCH, (3, 8)), config_changes=SMALL)
    yield works.Train(dtype, batches=BATCH, config_changes=SMALL)


def measured(work, who, **options):
    return run.measure(work, who, **{"rounds": 2, "blocks": 2, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_everyone_installed_is_right(dtype):
    """Every contestant that does a work here does it rightly, but for those that compile."""
    who = [peer for peer in peers("cpu") if not peer.slow_to_make]
    for work in small_works(dtype):
        row = measured(work, who, rounds=1, blocks=1)
        assert {"bert_fast", "eager reference"} <= row["results"].keys()
        assert not [r for r in row["results"].values() if "ms" not in r], row
        assert set(row["absent"].values()) <= {
            "runs on cuda alone",
            "the package flash_attn is not installed",
            "the package xformers is not installed",
            "has no backward",
            "is set up for float32 alone",
            "nothing would be prepacked here",
        }, row


class Planted(Torch):
    """PyTorch's own layer-norm with a fault."""

    name = "planted"

    def __init__(self, fault):
        self.fault, self.calls = fault, 0

    def layer_norm(self, work, inputs):
        right = super().layer_norm(work, inputs)

        def forward():
            self.calls += 1
            return self.fault(right.forward())

        return Run(forward, leaves=right.leaves, dout=right.dout)


FAULTS = {
    "a row": lambda t: torch.cat([t[:-1], t[-1:] * 2]),
    "half a percent": lambda t: t * 1.005,
    "a cheaper format": lambda t: t.bfloat16().to(t.dtype),
    "NaN": lambda t: torch.where(t == t.max(), math.nan, t),
    "shape": lambda t: t[1:],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_wrong_result_is_refused_and_not_timed(fault):
    work, planted = works.LayerNorm(torch.float32, rows=64, width=48), Planted(FAULTS[fault])
    row = measured(work, [Torch(), planted])
    assert row["results"]["planted"].keys() == {"refused"}
    assert row["results"]["planted"]["refused"].startswith("wrong: its result errs ")
    assert planted.calls == 1
    assert "ms" in row["results"]["torch.nn.functional"]


def test_the_same_contestant_without_a_fault_is_timed():
    work, right = works.LayerNorm(torch.float32, rows=64, width=48), Planted(lambda t: t)
    assert "ms" in measured(work, [right])["results"]["planted"]
    assert right.calls > 4


def test_a_wrong_gradient_is_refused():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, dout):
            return dout * 1.01

    work = works.LayerNorm(torch.float32, backward=True, rows=64, width=48)
    row = measured(work, [Planted(Scaled.apply)])
    assert "its gradient 1 errs" in row["results"]["planted"]["refused"]


def test_contestants_take_turns():
    turns = []
    samplers = {name: lambda name=name: turns.append(name) or 1.0 for name in "abc"}
    times = timing.interleaved(samplers, seconds=0, rounds=3)
    assert "".join(turns) == "abcabcabc"
    assert times == {name: [1.0] * 3 for name in "abc"}
    assert len(timing.interleaved(samplers, seconds=0)["a"]) == timing.LEAST_ROUNDS


def test_spread_holds_what_moved_between_blocks():
    still = timing.summary([[10, 10.1, 10.2], [10, 10.1, 10.2]])
    assert still == {"ms": 10.1, "spread": [10, 10.2], "rounds": 6}
    assert timing.summary([[10, 10.1, 10.2], [12, 12.1, 12.2]])["spread"] == [10.1, 12.1]


def result(ms, half=0.01):
    return {"ms": ms, "spread": [ms * (1 - half), ms * (1 + half)]}


def test_moved_is_beyond_both_spreads_and_not_the_machine(tmp_path, capsys):
    assert changes.moved(result(10), result(10.1)) == 0
    assert changes.moved(result(10), result(11)) == 1
    assert changes.moved(result(10), result(9)) == -1
    assert changes.moved(result(10, half=0.1), result(11)) == 0
    peers = {f"peer {i}": result(10 + i) for i in range(3)}
    slower = {name: result(r["ms"] * 1.2) for name, r in peers.items()}
    assert changes.machine_moved(peers, slower) == pytest.approx(1.2)

    def write(name, results):
        row = {"work": "w", "results": results}
        facts = {"environment": {"device": "d"}, "ceilings": {"copy GB/s": 10}}
        report.write(tmp_path / name, {**facts, "rows": [row]})
        return str(tmp_path / name)

    old = write("old.json", peers | {"bert_fast": result(5)})
    same = write("same.json", slower | {"bert_fast": result(6)})
    worse = write("worse.json", slower | {"bert_fast": result(9)})
    assert changes.compare(old, same) == []
    assert changes.compare(old, worse) == [("w", "bert_fast", pytest.approx(1.5))]
    assert main(["bench", "compare", old, same]) == 0
    assert "Nothing moved beyond the spread." in capsys.readouterr().out


def test_noise_is_told():
    quiet, wild = (
        [{"results": {"a": result(1, half), "b": {"refused": "wrong"}}}] for half in (0.02, 0.2)
    )
    steady = {"copy GB/s": 10.0}
    assert not run.noise(quiet, steady, steady)["too_noisy"]
    assert run.noise(wild, steady, steady)["too_noisy"]
    assert run.noise(quiet, steady, {"copy GB/s": 13.0})["too_noisy"]
    assert "too noisy" in report.noise_line(run.noise(wild, steady, steady))


def test_linearity_finds_line_and_distance():
    start, slope, off = plots.linearity([(100, 3.0), (200, 5.0), (400, 9.0)])
    assert (start, slope, off) == pytest.approx((1.0, 0.02, 0.0), abs=1e-9)
    assert plots.linearity([(100, 1.0), (200, 4.0), (400, 16.0)])[2] > 0.2


def test_possible_is_the_slower_ceiling_by_the_faster_way():
    results = {"copy": {"ms": 2}, "GEMMs alone": {"ms": 8}, "GEMMs alone, packed": {"ms": 5}}
    assert run._possible(results, list(results)) == 5
    assert run._possible(results, ["copy"]) == 2
    assert run._possible(results, []) == 0


@pytest.mark.parametrize("backward", [False, True])
def test_flops_and_gemms_agree(backward):
    """The model's count of FLOPs is that of the products its ceiling runs, and attention's."""
    work = works.Model(torch.float32, backward=backward, batches=BATCH, config_changes=SMALL)
    shapes = []

    class Counting(Gemms):
        def _products(self, work, sizes, backward, forward, times):
            shapes.extend(sizes * times * (forward + 2 * backward))

    Counting().model(work, None)
    linear = sum(2 * rows * i * o for rows, i, o in shapes)
    attention = 2 * 4 * sum(n * n for n in BATCH[0]) * 64 * (3 if backward else 1)
    assert work.flops == linear + attention


def test_lengths(monkeypatch):
    assert lengths.draw("full", 3, 128) == [[128] * 3]
    (uniform,) = lengths.draw("uniform", 64, 512, share=0.65)
    assert max(uniform) == 512
    assert sum(uniform) / (64 * 512) == pytest.approx(0.65, abs=0.01)
    (mostly_short,) = lengths.draw("uniform", 64, 512, share=0.2)
    assert max(mostly_short) == 512
    assert sum(mostly_short) / (64 * 512) == pytest.approx(0.2, abs=0.02)
    assert lengths.draw("uniform", 3, 10, share=0.01) == [[1, 1, 10]]
    with pytest.raises(ValueError, match=r"--share must be in \(0, 1\]"):
        lengths.draw("uniform", 2, 10, share=1.5)
    corpus = torch.randint(1, 700, (500,)).tolist()
    monkeypatch.setattr(lengths, "corpus", lambda name: corpus)
    drawn = lengths.draw("plots", 16, 512, order="random", batches=3)
    assert [len(batch) for batch in drawn] == [16] * 3
    assert all(length in {min(n, 512) for n in corpus} for batch in drawn for length in batch)
    ordered = lengths.draw("plots", 16, 512, order="sorted", batches=3)
    flat = [length for batch in ordered for length in batch]
    assert flat == sorted(flat)

    def padding(batches):
        return sum(len(b) * max(b) for b in batches) / sum(map(sum, batches))

    assert padding(ordered) < padding(drawn)


def test_real_lengths_are_those_of_the_corpus():
    reviews, plots = lengths.corpus("reviews"), lengths.corpus("plots")
    assert len(reviews) > 1000
    assert len(plots) > 100
    assert min(reviews) >= 3  # [CLS], a word, [SEP]
    assert sum(plots) / len(plots) > 3 * sum(reviews) / len(reviews)


def test_peak_memory_sees_a_tensor():
    peak = timing.peak_memory(lambda: torch.ones(8 << 20), "cpu")
    if peak is None:
        pytest.skip("this system does not tell a process's peak")
    assert 0.8 * (32 << 20) < peak < 3 * (32 << 20)


# ---- the command ----


def bench(*args, code=0):
    assert main(["bench", *args]) == code


OP = ["op", "--ops", "gelu", "--rows", "16", "--width", "8", "--peers", "torch.nn.functional",
      "--rounds", "2"]  # fmt: skip


def test_op_to_table_json_and_plot(tmp_path, capsys):
    out, plot = tmp_path / "new" / "op.json", tmp_path / "plots" / "op.png"
    bench(*OP, "--dtype", "float32", "bfloat16", "--json", str(out), "--plot", str(plot))
    found = json.loads(out.read_text())
    assert {"device", "threads", "torch", "python", "date"} <= found["environment"].keys()
    works_done = ["bias + gelu, 16 x 32", "bias + gelu, 16 x 32, backward"]
    assert [row["work"] for row in found["rows"]] == [
        f"{work}, {dtype}" for dtype in ("float32", "bfloat16") for work in works_done
    ]
    for row in found["rows"]:
        assert list(row["results"]) == ["bert_fast", "torch.nn.functional", "copy, as many bytes"]
        assert row["results"]["bert_fast"]["possible"] > 0
    assert found["noise"].keys() == {"spread", "largest_spread", "drift", "too_noisy"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "bias + gelu" in shown
    assert "% of possible" in shown
    bench("compare", str(out), str(out))


def test_sweep_over_batch_shows_the_line(tmp_path, capsys, monkeypatch):

    monkeypatch.setitem(selection.SWEEPS, "batch", (1, 2, 4))
    plot = tmp_path / "sweep.png"
    bench("sweep", "batch", "--seqlen", "16", "--peers", "sdpa", "--rounds", "1",
          "--plot", str(plot))  # fmt: skip
    assert "per 1,000 real tokens" in capsys.readouterr().out
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize("over", ["seqlen", "padding", "width"])
def test_sweeps_vary_what_they_say(over, monkeypatch):
    args = SimpleNamespace(level="sweep", over=over, device="cpu", dtype=None, models=None,
                           quick=False, seqlen=None, batch=None, lengths=None, share=0.65,
                           order="random")  # fmt: skip
    swept = list(selection.works_of(args))
    assert [x for x, _ in swept] == list(selection.SWEEPS[over])
    seen = [
        {"seqlen": w.lengths[0], "padding": round(1 - w.share, 1),
         "width": w.config_changes.get("hidden_size")}[over]
        for _, w in swept
    ]  # fmt: skip
    assert seen == pytest.approx(list(selection.SWEEPS[over]), abs=0.06)


def test_a_wrong_result_of_ours_ends_in_1(monkeypatch, capsys):
    right = Ours.gelu

    def wrong(self, work, inputs):
        run = right(self, work, inputs)
        return run if isinstance(self, Eager) else Run(lambda: run.forward() + 1)

    monkeypatch.setattr(Ours, "gelu", wrong)
    bench(*OP, "--directions", "forward", code=1)
    assert "refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--peers", "nobody"], "--peers: no peer is called 'nobody'"),
        (["--backends", "opencl"], "--backends: opencl"),
        (["--models", "gpt"], "--models: 'gpt' is neither"),
        (["--share", "2"], "--share must be"),
    ],
)
def test_bad_options_end_in_one_line(args, message, capsys):
    bench("layer", *args, code=1)
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"bert-fast bench: {message}")
    assert "\n" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_said(capsys):
    bench("op", "--device", "cuda", code=1)
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_compare_refuses_other_files(tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text("{}")
    bench("compare", str(other), str(other), code=1)
    assert "is not a result of bert-fast bench" in capsys.readouterr().err
    bench("compare", str(other), "absent.json", code=1)
    assert "there is no file absent.json" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: CUDA events")
def test_on_a_gpu_a_copy_takes_what_its_bytes_take():
    work = works.Gelu(torch.bfloat16, "cuda", rows=16384, width=3072)
    row = measured(work, [Torch(), *(p for p in peers("cuda") if p.ceiling)], rounds=10)
    copied = row["results"]["copy, as many bytes"]
    assert copied["method"] == "graph"
    assert 200e9 < row["bytes"] / (copied["ms"] * 1e-3) < 10e12
    assert 0.1 < row["results"]["torch.nn.functional"]["possible"] < 1.1
    assert row["results"]["torch.nn.functional"]["host_us"] > 0


def test_results_become_the_readmes_tables(tmp_path):
    from benchmarks.readme import tables

    assert "Not measured" not in tables(tmp_path)  # README's status table says it of all levels
    peers = {"torch.nn.functional": {"ms": 3.0}, "copy": {"ms": 0.9}, "bad": {"refused": "wrong"}}
    row = {"work": "w", "kind": "gelu", "ceilings": ["copy"]}
    slower = {"bert_fast cuda": {"ms": 2.0}, "eager reference": {"ms": 0.1}}
    rows = [
        row | {"results": {"bert_fast": {"ms": 1.5, "possible": 0.6}, **slower, **peers}},
        row | {"results": peers},
    ]
    (tmp_path / "gpu").mkdir()
    facts = {"device": "D", "driver": "1", "torch": "2", "date": "today"}
    report.write(tmp_path / "gpu" / "op.json", {"environment": facts, "rows": rows})
    shown = tables(tmp_path)
    assert "| w | 1.500 | `bert_fast` | 60% | 3.000 | `torch.nn.functional` | 2.00 |" in shown
    assert "| w | no kernel of ours |  |  | 3.000 | `torch.nn.functional` |  |" in shown
    assert "D, driver 1, torch 2, triton None, today, commit None; attention:" in shown
    assert "Not measured on any GPU yet: `bert-fast bench model`, " in shown


def test_accelerated_models_have_rows_of_their_own(tmp_path):
    from benchmarks.readme import tables

    results = {name: {"ms": ms} for name, ms in (
        ("bert_fast", 10.0), ("bert_fast.accelerate", 20.0), ("HF sdpa", 30.0))}  # fmt: skip
    row = {"work": "m, full, float32", "kind": "model", "ceilings": [], "results": results}
    facts = {"device": "D", "threads": 2, "cpu kernels": "avx2", "torch": "2", "transformers": "5",
             "date": "today", "commit": "abc"}  # fmt: skip
    (tmp_path / "cpu").mkdir()
    report.write(tmp_path / "cpu" / "bars.json", {"environment": facts, "rows": [row]})
    shown = tables(tmp_path)
    assert "D, 2 threads, avx2, torch 2, transformers 5, today, commit abc:" in shown
    assert "| workload | bert_fast, ms | faster than HF sdpa |" in shown
    assert "| m, full | 10 | 3.00 |" in shown
    assert "| m, full, `bert_fast.accelerate` | 20 | 1.50 |" in shown
    for dirty in (facts | {"dirty": True}, facts | {"commit": "abc-dirty"}):
        report.write(tmp_path / "cpu" / "bars.json", {"environment": dirty, "rows": [row]})
        assert "commit abc and uncommitted changes:" in tables(tmp_path)


def test_a_result_names_its_schema(tmp_path):
    path = tmp_path / "r.json"
    report.write(path, {"rows": []})
    assert json.loads(path.read_text())["schema"] == report.SCHEMA
    assert report.read(path)[1] == {}
    path.write_text('{"rows": []}')  # from before there was a schema
    assert report.read(path)[1] == {}
    path.write_text('{"schema": 2, "rows": []}')
    with pytest.raises(ValueError, match=r"r\.json is of schema 2; this version reads 1"):
        report.read(path)
    for text in ("[1]", "{", '{"rows": [1]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"r\.json is not a result of bert-fast bench"):
            report.read(path)


def test_csv(tmp_path):
    """A line for each work and contestant, refused ones with their reason."""
    results = {
        "bert_fast": {"ms": 1.5, "spread": [1.0, 2.0], "possible": 0.5},
        "peer, with a comma": {"refused": 'wrong "numbers"'},
    }
    row = {"work": "w, x", "kind": "gelu", "results": results, "tokens": None, "flops": 3,
           "bytes": 4, "absent": {}, "ceilings": []}  # fmt: skip
    report.write_csv(tmp_path / "r.csv", [row])
    with open(tmp_path / "r.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["contestant"] for line in lines] == list(results)
    assert lines[0]["work"] == "w, x"
    numbers = [lines[0][name] for name in ("ms", "spread_low", "spread_high")]
    assert numbers == ["1.5", "1.0", "2.0"]
    assert lines[1]["ms"] == ""
    assert lines[1]["refused"] == 'wrong "numbers"'


def test_no_matplotlib_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"x\.png is not drawn: .*bert_fast\[plot\]"):
        assert not can_draw("x.png")
