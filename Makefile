# Two commands do everything, also on a fresh machine with Python >= 3.10:
#   make quickstart   phantom cohort -> pretraining -> zero-shot scores -> similar cases -> report
#   make test         lint, types, import contract and every test; what CI runs

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
QUERY ?= phantom_00125_a

# A port of this run's own, so that two runs on one machine don't meet.
PORT := $(shell $(PYTHON) -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
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
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# Every step skips what is done and goes on where it was interrupted; read them as the manual.
quickstart: $(INSTALLED)
	$(BIN)/ctclip-phantom --config configs/phantom/quickstart.yaml --out $(RUN)/phantoms
	$(BIN)/ctclip-prepare --config configs/prepare/quickstart.yaml --source $(RUN)/phantoms/manifest.csv --out $(RUN)/cohort
	DS_ACCELERATOR=cpu $(BIN)/deepspeed --log_level error --num_gpus 2 --master_port $(PORT) train/pretrain.py --config configs/pretrain/quickstart.yaml cohort=$(RUN)/cohort out=$(RUN)/train
	$(BIN)/python eval/zero_shot.py --ckpt $(RUN)/train/model.safetensors --cohort $(RUN)/cohort --split test --out $(RUN)/zero_shot
	$(BIN)/python eval/export_embeddings.py --ckpt $(RUN)/train/model.safetensors --cohort $(RUN)/cohort --split test --out $(RUN)/archive
	$(BIN)/python eval/similar.py --table $(RUN)/archive/volumes.parquet --study $(QUERY) --cohort $(RUN)/cohort --out $(RUN)/similar
	$(BIN)/ctclip-summary --run $(RUN)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

clean:
	rm -rf $(RUN)
