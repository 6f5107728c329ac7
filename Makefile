# make train   train, evaluate and generate on the bundled documents (CPU or GPU); run again to resume
# make test    fast tests          make lint   style
# make bench-attention, make bench-moe   speed and memory against peers, in one run each
# make bench-checkpoint   how long a save of 1 GB holds training up
# Everything is set up on first use; nothing but Python 3.11 or 3.12, make and a C++ compiler is needed beforehand.

PYTHON ?= python3
RUN ?= runs/tiny
PROCESSES ?= 2
LIMIT ?= 60
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test lint bench-attention bench-moe bench-checkpoint setup clean
.DELETE_ON_ERROR:

setup: $(VENV)/.requirements $(VENV)/.requirements-dev

train: $(VENV)/.requirements
	@sh tools/train_demo.sh $(BIN) $(RUN) $(PROCESSES) $(LIMIT)

test: $(VENV)/.requirements-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" --durations=15

lint: $(VENV)/.requirements-dev
	$(BIN)/ruff check .

bench-attention: $(VENV)/.requirements-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/attention.py

bench-moe: $(VENV)/.requirements-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/moe.py

bench-checkpoint: $(VENV)/.requirements-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/checkpoint.py

clean:
	rm -rf runs .cache

$(VENV)/.requirements: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.requirements-dev: requirements-dev.txt $(VENV)/.requirements
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
