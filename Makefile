# The two commands of the README. Each makes .venv, installs what is missing, and runs; repeating them is safe.
PYTHON ?= python3
BIN := .venv/bin
# One thread per test process: two of them share the machine without fighting over it.
WORKERS ?= 2

.PHONY: quickstart test

quickstart: .venv/train
	$(BIN)/imageprompt quickstart

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS)

# The stamp's name is the extra that is installed; the quickstart needs none of what tests need.
.venv/train .venv/test: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("imageprompt needs Python 3.10 or newer, this is " + sys.version)'
	@echo "Installing into .venv; PyTorch is large, so the first time takes some minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable ".[$(notdir $@)]"
	@touch $@
