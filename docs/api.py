"""The API reference as HTML, from the docstrings: make docs."""

import argparse
from pathlib import Path

import pdoc

import bert_fast

# Beside the package itself, whose public names are most of it.
MODULES = [
    "bert_fast",
    "bert_fast.ops",
    "bert_fast.backends",
    "bert_fast.models.packing",
    "bert_fast.embeddings",
    "bert_fast.hugging_face",
    "bert_fast.training.pretrain",
    "bert_fast.training.finetune",
    "bert_fast.training.tuned",
    "bert_fast.training.tasks",
    "bert_fast.bench.peers",
]


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("out", type=Path, help="the folder to write to")
    out = options.parse_args().out
    for name in bert_fast.__all__:  # pdoc does not ask a module for what it imports when used
        setattr(bert_fast, name, getattr(bert_fast, name))
    pdoc.render.configure(docformat="google", math=True)
    pdoc.pdoc(*MODULES, output_directory=out)
    print(f"{out / 'index.html'}: {len(MODULES)} modules")


if __name__ == "__main__":
    main()
