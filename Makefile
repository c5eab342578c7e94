# make demo   the main job: a real search by a real BERT, ours beside Hugging Face's
# make test   lint and tests, minutes;  make test-full adds what takes longer
# make build  the extension in place, incremental;  make bench  the speed bars
# make docs   the API reference, from the docstrings, as HTML in out/docs
# make gpu OUT=DIR [PARTS="test op"] [LIMIT=540]   what only a GPU can show; needs no .venv
# make carry  the extension for such a machine (CROSS_PYTHON, CROSS_ARCHS), built here

PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
# Two at a time; threads that wait do not spin, for the other needs their core.
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2 --dist worksteal --durations 20
OUT ?= out/gpu
LIMIT ?= 540
CROSS_PYTHON ?= python3.12
CROSS_ARCHS ?= 90a
export BERT_FAST_CACHE ?= $(CURDIR)/.cache

.PHONY: demo test test-full bench docs gpu carry build clean

demo: build
	$(PY) -m benchmarks.demo

test: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not full and not gpu"

test-full: build
	$(PYTEST) -m "full and not gpu"

bench: build
	$(PY) -m pip install -q -c constraints.txt -e ".[bench]" --no-build-isolation
	mkdir -p out
	$(PY) -m benchmarks.bars --json out/bars.json
	$(PY) -m benchmarks.busy --json out/busy.json

docs: build
	$(PY) -m pip install -q -c constraints.txt -e ".[docs]" --no-build-isolation
	$(PY) docs/api.py out/docs

gpu:
	$(PYTHON) -m benchmarks.gpu --out "$(OUT)" --parts "$(PARTS)" --limit "$(LIMIT)"

carry:
	rm -rf build/carry
	BERT_FAST_CUDA=on BERT_FAST_CUDA_ARCHS="$(CROSS_ARCHS)" \
	  $(CROSS_PYTHON) -m pip wheel -q --no-deps -w build/carry .
	$(CROSS_PYTHON) -m zipfile -e build/carry/*.whl build/carry/wheel
	cp build/carry/wheel/bert_fast/_C*.so bert_fast/

# The stamp holds the environment; ninja decides what of the extension is out of date.
build: .venv/installed
	$(PY) setup.py -q build_ext --inplace

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf build out .venv bert_fast/_C*.so
