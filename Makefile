# make train   train, evaluate and generate on the bundled documents (CPU or GPU); run again to resume
# make test    fast tests          make lint   style
# make bench-attention, make bench-moe   speed and memory against peers, in one run each
# Everything is set up on first use; nothing but Python 3.11 or 3.12, make and a C++ compiler is needed beforehand.

PYTHON ?= python3
RUN ?= runs/tiny
PROCESSES ?= 2
LIMIT ?= 60
VENV := .venv
TORCH := $(if $(shell command -v nvidia-smi || command -v sbatch),default,cpu)
BIN := $(VENV)/bin

.PHONY: train test lint bench-attention bench-moe setup clean
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

clean:
	rm -rf runs .cache

$(VENV)/.requirements: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if [ $(TORCH) = cpu ]; then \
		echo "no nvidia-smi and no sbatch here: taking PyTorch's CPU build (make TORCH=default: the one with CUDA)"; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --timeout 10 --retries 1 \
			--index-url https://download.pytorch.org/whl/cpu $$(grep -o '^torch==[0-9.]*' requirements.txt) \
			|| echo "its index cannot be reached: taking the default build, 4 GB larger"; fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.requirements-dev: requirements-dev.txt $(VENV)/.requirements
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
