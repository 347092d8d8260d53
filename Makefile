# Every target makes its own virtual environment in .venv; nothing has to be installed before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More options of `make train`.
ARGS ?=
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

.PHONY: train test test-slow test-exhaustive bench compare check format clean

train: $(VENV)/.train  ## a small model learns to rank on the built-in task
	$(BIN)/fastrank train --output_dir runs/built-in --overwrite_output_dir $(ARGS)

test: $(VENV)/.dev check  ## formatting, types, and every test that is neither slow nor for a GPU
	$(PYTEST)

test-slow: $(VENV)/.dev $(VENV)/.deepspeed  ## the tests that take minutes
	$(PYTEST) -m "slow and not gpu"
	PYTHONPATH=$(VENV)/deepspeed $(PYTEST) -m slow -k zero tests/training

test-exhaustive: $(VENV)/.dev  ## every kernel configuration compiled for four GPUs, half an hour
	$(BIN)/pytest -m exhaustive

bench: $(VENV)/.dev $(VENV)/.peers  ## the CPU tables and curves of the pages, about 30 minutes
	set -e; for suite in loss rank attention step; do \
	  $(BIN)/fastrank bench --suite $$suite --device cpu --seconds 10 --output bench/results; done
	$(BIN)/python -m bench.curves --output bench/results
	$(BIN)/python -m bench.tables
	$(BIN)/python -m bench.goals bench/results

compare: $(VENV)/.dev  ## the effect of each loss on the same candidates, over three seeds
	$(BIN)/python -m bench.compare --output bench/results
	$(BIN)/python -m bench.tables

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build *.egg-info

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(BIN)/pip pyproject.toml constraints.txt
	$(PIP) -e ".[train]"
	touch $@

$(VENV)/.dev: $(BIN)/pip pyproject.toml constraints.txt
	$(PIP) -e ".[dev]"
	touch $@

# In a folder of its own, for the tests of ZeRO alone: whatever finds DeepSpeed imports it. On a CPU
# its engine needs no compiler and no CUDA, and these packages beside what is already here.
$(VENV)/.deepspeed: $(VENV)/.dev
	$(PIP) --no-deps --upgrade --target $(VENV)/deepspeed \
	  deepspeed hjson msgpack ninja einops py-cpuinfo
	touch $@

# The peers' own requirements would bring another torch: what they need of it is already here.
$(VENV)/.peers: $(VENV)/.dev
	$(PIP) --no-deps liger-kernel cut-cross-entropy trl
	touch $@
