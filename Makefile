# The two commands of a newcomer: make demo, make test. Everything they need goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
.PHONY: demo test lint clean

demo: .venv/.ready
	@$(BIN)/sememe demo

test: .venv/.ready
	@$(BIN)/python -m pytest

lint: .venv/.ready
	@$(BIN)/ruff check src tests examples

# torch comes first and pinned: on a machine without it, a bare "torch" would bring the newest build with all of CUDA.
.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python %d.%d: need 3.11 or newer. try: make PYTHON=python3.11" % sys.version_info[:2])'
	@echo "setting up .venv: torch, transformers and what they need (a minute where packages are near; once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) torch==2.13.0
	@$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv runs
