"""The bert-fast command: env, embed, compare, and its errors."""

import argparse
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from bert_fast.bench import compare as comparison
from bert_fast.bench import data
from bert_fast.cli import COMMANDS, main, parser


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(film.reviews[0] for film in data.films()[:20]), encoding="utf-8")
    return path


def test_env(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "CPU kernels", "eager", "triton", "auto", "BERT_FAST_BACKEND"):
        assert word in out


def test_embed(tmp_path, texts, capsys):
    model = ["--model", str(data.minilm()), "--text", str(texts)]
    arrays, lines = tmp_path / "out.npy", tmp_path / "out.jsonl"
    assert main(["embed", *model, "--out", str(arrays)]) == 0
    assert main(["embed", *model, "--out", str(lines)]) == 0
    vectors = np.load(arrays)
    assert vectors.shape == (20, 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == texts.read_text(encoding="utf-8").split("\n")
    assert np.allclose([row["embedding"] for row in rows], vectors, atol=1e-6)

    before = arrays.read_bytes()
    assert main(["embed", *model, "--out", str(arrays)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert arrays.read_bytes() == before
    assert main(["embed", *model, "--out", str(arrays), "--overwrite"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.npy", "texts.txt"]


def test_compare(tmp_path, texts, capsys):
    plot = tmp_path / "plots" / "times.png"
    options = ["--rounds", "1", "--limit", "8", "--plot", str(plot)]
    assert main(["compare", "--model", str(data.minilm()), "--text", str(texts), *options]) == 0
    out = capsys.readouterr().out
    assert "8 texts" in out
    assert "HF sdpa, sorted" in out
    assert "Largest difference" in out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_errors_are_one_line_and_leave_nothing(tmp_path, texts, capsys):
    out = tmp_path / "out.npy"

    def fails(*args):
        assert main(["embed", *args]) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith("bert-fast embed: ")
        assert "\n" not in error
        assert not out.exists()
        return error

    model, text = ["--model", str(data.minilm())], ["--text", str(texts)]
    assert "no config.json" in fails("--model", str(tmp_path), *text, "--out", str(out))
    assert "No such file" in fails(*model, "--text", "absent.txt", "--out", str(out))
    assert ".npy or .jsonl" in fails(*model, *text, "--out", str(tmp_path / "out.csv"))
    assert "no directory" in fails(*model, *text, "--out", str(tmp_path / "absent" / "out.npy"))
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "holds no text" in fails(*model, "--text", str(empty), "--out", str(out))


def test_help_and_version_import_no_command():
    code = """
import contextlib, io, sys
from bert_fast.cli import main
for option in ("--version", "--help"):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main([option])
slow = ("bert_fast.training", "bert_fast.bench", "bert_fast.inspect", "bert_fast.embeddings",
        "transformers", "matplotlib", "rich")
print([name for name in sys.modules if name.startswith(slow)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for name, (text, _) in COMMANDS.items():
        assert f"{name} {' '.join(text.split())}" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_its_options(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: bert-fast {name} ")
    if name not in ("env", "bench"):  # bench's are its levels'
        assert "\n  --" in out


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["embde"])
    assert stopped.value.code == 2
    assert "embde" in capsys.readouterr().err


def test_compare_without_matplotlib_goes_on(tmp_path, texts, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot = tmp_path / "times.png"
    options = ["--rounds", "1", "--limit", "4", "--device", "cpu", "--plot", str(plot)]
    assert main(["compare", "--model", str(data.minilm()), "--text", str(texts), *options]) == 0
    printed = capsys.readouterr()
    assert "Largest difference" in printed.out
    assert "Plot:" not in printed.out
    assert 'pip install "bert_fast[plot]"' in printed.err
    assert len(printed.err.strip().split("\n")) == 1
    assert not plot.exists()


def test_compare_without_transformers(texts, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["compare", "--model", "absent", "--text", str(texts)]) == 1
    printed = capsys.readouterr()
    assert 'pip install "bert_fast[hf]"' in printed.err
    assert len(printed.err.strip().split("\n")) == 1


def test_comparison_shows_its_progress(texts):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)
    some = texts.read_text(encoding="utf-8").split("\n")[:4]
    rows, _ = comparison.compare(data.minilm(), some, rounds=2, progress=console)
    assert [len(row.seconds) for row in rows] == [2] * len(rows)
    for row in rows:
        for label in ("warm-up", "round 1 of 2", "round 2 of 2"):
            assert f"{label}: {row.name}" in shown.getvalue()
    steps = 3 * len(rows)
    assert all(f"{done}/{steps}" in shown.getvalue() for done in range(1, steps + 1))


@pytest.mark.parametrize("name", ["embed", "compare"])
def test_device(name, tmp_path, texts, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = ["--model", str(data.minilm()), "--text", str(texts)]
    if name == "embed":
        options += ["--out", str(tmp_path / "out.npy")]
    assert main([name, *options, "--device", "cuda"]) == 1
    assert "torch sees no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([name, *options, "--device", "tpu"])
    assert "auto" in capsys.readouterr().err


def test_the_parser_without_words_knows_every_command_in_full():
    [commands] = parser()._subparsers._group_actions
    assert sorted(commands.choices) == sorted(COMMANDS)
    for name in COMMANDS:
        [alone] = parser([name])._subparsers._group_actions
        assert commands.choices[name].format_help() == alone.choices[name].format_help()


def every_parser(one, name="bert-fast"):
    yield name, one
    for action in one._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, sub in action.choices.items():
                yield from every_parser(sub, f"{name} {word}")


def test_every_option_has_a_help_text():
    found = list(every_parser(parser()))
    assert {"bert-fast bench op", "bert-fast predict"} <= {name for name, _ in found}
    bare = [
        f"{name} {action.dest}"
        for name, one in found
        for action in one._actions
        if not isinstance(action, argparse._SubParsersAction) and not action.help
    ]
    assert not bare
