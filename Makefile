# Two commands do everything, also on a fresh machine with Python >= 3.10:
#   make quickstart   phantom cohort -> pretraining -> zero-shot scores -> similar cases -> report
#   make test         lint, types, import contract and every test; what CI runs

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
QUERY ?= first

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Two processes share the cores of a laptop: one thread each, no network, no tracker account.
export OMP_NUM_THREADS ?= 1
export WANDB_MODE ?= offline
export TOKENIZERS_PARALLELISM ?= false
export PYTHONWARNINGS ?= ignore::FutureWarning

.PHONY: install quickstart test lint clean
.DEFAULT_GOAL := quickstart

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("ctclip needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; run: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt -e ".[dev]"
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

clean:
	rm -rf $(RUN)
