# Every target sets up what it needs first; `make` alone lists the targets.

ifndef PYTHON
PYTHON := $(shell for p in python3 python3.12 python3.13 python3.11 python3.14 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null \
	&& { echo $$p; break; }; done)
endif
export IGNORE_NEURON
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
XLA_VENV := .venv-xla
XLA_STAMP := $(XLA_VENV)/.ready
ifndef XLA_PYTHON
XLA_PYTHON := $(shell for p in python3 python3.12 python3.13 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { echo $$p; break; }; done)
endif
ARGS ?=
SHARD ?= 1/1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart quickstart-fresh test test-slow test-sim test-xla test-parity test-faults lint format bench bench-checkpoint tensorboard clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): setup.py tools/constraints.txt tools/setup_env.py
	@test -n "$(PYTHON)" || { echo "setup: no Python 3.10 to 3.14 found; name one: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) tools/setup_env.py $(VENV)
	@touch $@

setup: $(STAMP) ## make the environment .venv (PYTHON=… chooses the Python)

quickstart: $(STAMP) ## train a small Llama, tensor parallel with ZeRO-1, through torchrun; again: resume
	$(BIN)/python examples/llama/quickstart.py $(ARGS)

quickstart-fresh: $(STAMP) ## the same from step 0, forgetting the earlier run
	$(BIN)/python examples/llama/quickstart.py --fresh $(ARGS)

test: $(STAMP) ## all tests but the slow ones, a share of them on the simulated neuron device first
	$(BIN)/python -m tests.sim --share
	$(BIN)/python -m pytest -m "not slow" --timeout 600 $(ARGS)

test-sim: $(STAMP) ## every test of training and checkpoints on the simulated neuron device
	$(BIN)/python -m tests.sim $(ARGS)

$(XLA_STAMP): setup.py tools/constraints.txt tools/setup_xla.py
	@test -n "$(XLA_PYTHON)" || { echo "setup: torch-xla 2.9 needs Python 3.10 to 3.13; name one: make test-xla XLA_PYTHON=/path/to/python3" >&2; exit 1; }
	$(XLA_PYTHON) tools/setup_xla.py $(XLA_VENV)
	@touch $@

test-xla: $(XLA_STAMP) ## the XLA backend on real torch-xla, in an environment of its own (7 GB); ARGS="--share" for a part
	$(XLA_VENV)/bin/python -m tests.xla $(ARGS)

test-slow: $(STAMP) ## the slow tests
	$(BIN)/python -m pytest -m slow --timeout 3600 $(ARGS)

test-parity: RESULTS ?= .parity/results.jsonl
test-parity: $(STAMP) ## every cell of the parity grid; SHARD=2/8 runs a part, run again it resumes
	$(BIN)/python tools/parity.py grid --shard $(SHARD) --results $(RESULTS) $(ARGS)
	$(BIN)/python tools/parity.py table --results $(RESULTS)

test-faults: RESULTS ?= .faults/results.jsonl
test-faults: $(STAMP) ## every case of the fault matrix; SHARD=2/8 runs a part, run again it resumes; ARGS="--rows 1 3"
	$(BIN)/python tools/faults.py run --shard $(SHARD) --results $(RESULTS) $(ARGS)
	$(BIN)/python tools/faults.py table --results $(RESULTS)

lint: $(STAMP) ## ruff, mypy --strict, bash -n
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy --strict neuron_lightning
	@find . -path ./$(VENV) -prune -o -path ./$(XLA_VENV) -prune -o \( -name '*.sh' -o -name '*.sbatch' -o -path ./.ci/run \) -print \
	| while read -r script; do bash -n "$$script" || exit 1; done

format: $(STAMP) ## rewrite the sources as `make lint` wants them
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(STAMP) ## tokens/s and MFU of a step against the peers (ARGS="--quick" for a short one)
	$(BIN)/python tools/bench/step.py $(ARGS)

bench-checkpoint: $(STAMP) ## saves and loads against the peers, on the disk under .bench (five minutes)
	$(BIN)/python tools/bench/checkpoint.py $(ARGS)

tensorboard: $(STAMP) ## look at the logs under runs/
	$(BIN)/python -m tensorboard.main --logdir runs $(ARGS)

clean: ## remove the environment, caches and build leftovers; runs/ stays
	rm -rf $(VENV) $(XLA_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
