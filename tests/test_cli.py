"""The bert-fast command: env, embed, compare, and its errors."""

import json
import subprocess
import sys

import numpy as np
import pytest

from bert_fast.bench import data
from bert_fast.cli import COMMANDS, main


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
