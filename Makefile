# make train   train, evaluate and generate on the bundled documents (CPU or GPU); run again to resume
# make test    fast tests          make lint   style
# make gpu     installs flash-attn and MegaBlocks beside PyTorch, on a CUDA machine
# make bench   measures what is not measured yet and writes docs/benchmarks.md; PART=step: only that part; AGAIN=1: anew
# make bench-e2e DATA=folder   quality after four minutes
# make test-megablocks                   equality with the real MegaBlocks, in Triton's interpreter
# Everything is set up on first use; nothing but Python 3.11 or 3.12, make and a C++ compiler is needed beforehand.

PYTHON ?= python3
RUN ?= runs/tiny
PROCESSES ?= 2
LIMIT ?= 60
VENV := .venv
TORCH := $(if $(shell command -v nvidia-smi || command -v sbatch),default,cpu)
BIN := $(VENV)/bin

MEGABLOCKS := $(VENV)/megablocks

.PHONY: train test test-megablocks lint gpu bench bench-e2e setup clean
.DELETE_ON_ERROR:

setup: $(VENV)/.requirements $(VENV)/.requirements-dev

train: $(VENV)/.requirements
	@sh tools/train_demo.sh $(BIN) $(RUN) $(PROCESSES) $(LIMIT)

test: $(VENV)/.requirements-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" --durations=15

# Triton only serves these tests on a CPU, so it stays out of the environment that trains.
test-megablocks: $(MEGABLOCKS)/.installed
	REQUIRE_MEGABLOCKS=1 OMP_NUM_THREADS=1 PYTHONPATH=$(MEGABLOCKS) $(BIN)/python -m pytest \
	    tests/model/moe/test_moe_megablocks.py

gpu: $(VENV)/.requirements
	$(BIN)/python tools/install_gpu.py

lint: $(VENV)/.requirements-dev
	$(BIN)/ruff check .

bench: $(VENV)/.requirements-dev
	$(BIN)/python benchmarks/run.py $(PART) $(if $(AGAIN),--again)

bench-e2e: $(VENV)/.requirements-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/e2e.py $(DATA)

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

$(MEGABLOCKS)/.installed: requirements-gpu.txt $(VENV)/.requirements-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(MEGABLOCKS) --upgrade --no-deps \
	    --no-build-isolation --use-pep517 triton==3.7.1 \
	    $$(sed -nE 's/^((megablocks|stanford-stk)==[0-9.]+).*/\1/p' requirements-gpu.txt)
	touch $@
