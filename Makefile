# `make quickstart` and `make test` need nothing but Python 3.12: .venv is made on first use.
PYTHON ?= python3.12
BIN := .venv/bin
AOT := .venv-aot/bin
RUN := runs/quickstart

.PHONY: help setup quickstart test test-all test-aot lint

help:
	@echo "make setup       create .venv and install both packages into it"
	@echo "make quickstart  train, evaluate, plot and sample a small model on the CPU"
	@echo "make test        the tests that CI runs"
	@echo "make test-all    the slow tests too"
	@echo "make test-aot    compile for eight H100 without one: schedule, traffic, copies, machine code"
	@echo "make lint        check format and lint rules"

setup: .venv/installed

.venv/installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || \
		{ echo "make setup: '$(PYTHON)' is not a Python >= 3.12; install python3.12 or say make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,dev]'
	@touch $@

quickstart: setup
	$(BIN)/longcat train --config=configs/quickstart.py --workdir=$(RUN)
	$(BIN)/longcat evaluate --checkpoint=$(RUN) --baselines
	$(BIN)/longcat report --workdir=$(RUN)
	$(BIN)/longcat generate --checkpoint=$(RUN) --prompt='def ' --max_new_tokens=96 --temperature=0.7
	@echo "plots: $(RUN)/report.html (one file, opens without a network) and $(RUN)/report.png"

test: setup
	@$(BIN)/python -m pytest -n auto --dist loadfile

test-all: setup
	@$(BIN)/python -m pytest -n auto --dist loadfile -m 'not gpu'

# In an environment of its own: the CUDA plugin talks on stderr, which tests read.
test-aot: .venv-aot/installed
	@$(AOT)/python -m pytest -m slow tests/parallel/test_deviceless.py tests/kernels/test_machine_code.py \
		tests/model/test_norm.py

.venv-aot/installed: setup.py
	@$(PYTHON) -m venv .venv-aot
	@echo "installing the compiler for GPUs into .venv-aot ..."
	@$(AOT)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,aot]'
	@touch $@

lint: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
