# Every target does its own set-up: on a fresh clone `make train` or `make test` is all that is needed.
#   make train ARGS="model=transformer_tiny train.steps=100"
#   make test ARGS="tests/config -x"
PYTHON ?= python3
ARGS ?=
# Test processes beside each other, each with one thread.
JOBS ?= auto
# Those that share one GPU: each holds about half a GiB of it.
GPU_JOBS ?= 8
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: setup train test test-gpu lint clean

train: setup
	$(BIN)/python scripts/train.py $(ARGS)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-gpu: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(GPU_JOBS) --dist worksteal -m "gpu or kernel" $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(INSTALLED)

# The stamp is older than these files when they change: set-up then runs again, into the same environment.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "titanfunc needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ...")'
	@echo "Installing into $(VENV) (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) 'setuptools>=77'
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find titanfunc kernels scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
