# The two commands of a newcomer: make demo, make test. Everything they need goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: demo test lint clean

demo: .venv/.ready
	$(BIN)/sememe demo

test: .venv/.ready
	$(BIN)/python -m pytest

lint: .venv/.ready
	$(BIN)/ruff check src tests examples

# torch comes first and pinned: on a machine without it, a bare "torch" would bring the newest build with all of CUDA.
.venv/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python %d.%d: need 3.11 or newer. try: make PYTHON=python3.11 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
