"""Every code block of README and docs: Python runs as it stands, commands parse, targets exist."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import bert_fast
from bert_fast import cli
from bert_fast.bench import data

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
# What a block may be besides: a drawing, a plot, a citation.
OTHERS = {"", "mermaid"}


def blocks(page, language):
    return [text for kind, text in BLOCK.findall(page.read_text("utf-8")) if kind == language]


def with_language(language):
    return [pytest.param(p, id=p.name) for p in PAGES if p.exists() and blocks(p, language)]


def test_no_block_is_of_a_kind_that_nothing_checks():
    for page in filter(Path.exists, PAGES):
        kinds = {kind for kind, _ in BLOCK.findall(page.read_text("utf-8"))}
        assert kinds <= OTHERS | {"python", "sh"}, page


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The directories that the pages name: MiniLM's own files, and small models of the others."""
    monkeypatch.chdir(tmp_path)
    minilm = data.minilm()
    shutil.copytree(minilm, "all-MiniLM-L6-v2")
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(minilm, num_hidden_layers=1)
    for name, kind in (
        ("bert-base-uncased", transformers.BertModel),
        ("my-model", transformers.BertForSequenceClassification),
        ("my-cross-encoder", transformers.BertForSequenceClassification),
    ):
        config.num_labels = 1 if name == "my-cross-encoder" else 2
        kind(config).save_pretrained(name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(minilm) / file, name)


@pytest.mark.parametrize("page", with_language("python"))
def test_python_blocks_run(page, models):
    """A page's blocks one after another, in one namespace, which begins empty."""
    namespace = {"__name__": "page"}
    for number, text in enumerate(blocks(page, "python"), 1):
        exec(compile(text, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", with_language("sh"))
def test_commands_parse(page):
    """Options, targets and modules that the page names are there; nothing is run."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|;", line.partition(" #")[0]):
                words = shlex.split(command)
                if not words or words[0].startswith("#") or "..." in words:
                    continue
                if words[0] == "bert-fast":
                    cli.parser(words[1:]).parse_args(words[1:])
                elif words[0] == "make":
                    target = next(word for word in words[1:] if "=" not in word)
                    assert re.search(rf"^{target}:", makefile, re.M), command
                elif words[:2] == ["python", "-m"]:
                    assert importlib.util.find_spec(words[2]), command
                elif words[0] == "python":
                    assert (ROOT / words[1]).is_file(), command
                else:
                    assert words[0] in ("pip", "git", "cd", "torchrun", "apt-get"), command


def test_api_reference(tmp_path):
    """make docs: every public name has its entry."""
    subprocess.run([sys.executable, ROOT / "docs/api.py", tmp_path], check=True, env={
        **os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"})  # fmt: skip
    page = (tmp_path / "bert_fast.html").read_text("utf-8")
    modules = {"nn"}
    missing = [name for name in bert_fast.__all__ if f'id="{name}"' not in page]
    assert set(missing) <= modules
    assert (tmp_path / "bert_fast/nn.html").is_file()
