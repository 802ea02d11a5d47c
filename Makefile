# The commands of a newcomer: make demo, make test. Everything they need goes into .venv, in the versions of constraints.txt.
# make digest needs no torch and has an environment of its own, made in seconds.
PYTHON ?= python3
# On Linux this brings CUDA, unless your index has builds of its own: make gpu TORCH="torch --index-url URL" takes another build.
TORCH ?= $(shell grep '^torch==' constraints.txt)
BIN := .venv/bin
PIP := -m pip install --quiet --disable-pip-version-check
OLD_ENOUGH := import sys; v = sys.version_info[:2]; \
	sys.exit(v < (3, 11) and "Python %d.%d: need 3.11 or newer. try: make PYTHON=python3.11" % v)
# The models of the tests are tiny: one process a core, each with one thread.
PYTEST := -m pytest --numprocesses logical --dist worksteal
.PHONY: demo gpu digest test check-reliability test-ray test-newest test-oldest lock lint clean

demo: .venv/.ready
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh runs/demo.sh

# Its variables are in the script: make gpu BASE=folder DATA=folder TOKENS=50000000, or TINY=1.
gpu: .venv/.ready
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh runs/gpu.sh

test: .venv/.ready
	@$(BIN)/python $(PYTEST)

# All that `make test` has only the fast core of, at most 15 minutes on two cores: SECURITY.md.
check-reliability: .venv/.ready
	@$(BIN)/python $(PYTEST) -m reliability

# Several processes: 140 MB that `make test` does without, and a Ray of its own at a time.
test-ray: .venv/.ready
	@$(BIN)/python $(PIP) --constraint constraints.txt --editable '.[dev,ray]'
	@$(BIN)/python -m pytest -q tests/test_ray.py

digest: .venv-digest/.ready
	@.venv-digest/bin/sememe-digest run --config digest/examples/seed.yaml --feeds digest/tests/data/2026-02-17 \
		--no-summaries --out runs/digest/site

# Before a release: the newest and the oldest libraries that pyproject.toml allows. Both take torch from constraints.txt, since
# another one is gigabytes of CUDA on most machines; `make TORCH=torch test-newest` takes the newest of it too.
test-newest:
	@rm -rf .venv-newest && $(PYTHON) -m venv .venv-newest
	@.venv-newest/bin/python $(PIP) $(TORCH)
	@.venv-newest/bin/python $(PIP) --editable '.[dev]' --editable './digest[dev]'
	@.venv-newest/bin/python -m pip list --format=freeze | grep -iE '^(torch|transformers|peft|accelerate|datasets)=='
	@.venv-newest/bin/python $(PYTEST)

test-oldest:
	@rm -rf .venv-oldest && $(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python $(PIP) $(TORCH) uv
	@.venv-oldest/bin/uv pip install --quiet --python .venv-oldest --resolution lowest-direct $(TORCH) --editable '.[dev]'
	@.venv-oldest/bin/uv pip install --quiet --python .venv-oldest --editable './digest[dev]'
	@.venv-oldest/bin/python -m pip list --format=freeze | grep -iE '^(torch|transformers|peft|accelerate|datasets)=='
	@.venv-oldest/bin/python $(PYTEST)

# Writes constraints.txt anew from what .venv-newest holds, once `make test-newest` has passed there.
lock:
	@grep '^#' constraints.txt > .lock
	@.venv-newest/bin/python -m pip list --format=freeze --exclude-editable | grep -vE '^(pip|setuptools)==' | sed 's/+cpu$$//' >> .lock
	@mv .lock constraints.txt

lint: .venv/.ready
	@$(BIN)/ruff check src tests examples digest

# torch comes first: on a machine without it, a bare "torch" would bring the newest build with all of CUDA.
.venv/.ready: pyproject.toml digest/pyproject.toml constraints.txt
	@$(PYTHON) -c '$(OLD_ENOUGH)'
	@echo "setting up .venv: torch, transformers and what they need (a minute where packages are near; once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python $(PIP) --constraint constraints.txt $(TORCH)
	@$(BIN)/python $(PIP) --constraint constraints.txt --editable '.[dev]' --editable './digest[dev]'
	@touch $@

.venv-digest/.ready: digest/pyproject.toml constraints.txt
	@$(PYTHON) -c '$(OLD_ENOUGH)'
	@test -x .venv-digest/bin/python || $(PYTHON) -m venv .venv-digest
	@.venv-digest/bin/python $(PIP) --constraint constraints.txt --editable ./digest
	@touch $@

clean:
	rm -rf .venv .venv-digest .venv-newest .venv-oldest runs/*/
