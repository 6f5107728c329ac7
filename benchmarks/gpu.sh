#!/usr/bin/env bash
# Checks the GPU's kernels against exact references, measures them and whole training steps, and renews
# docs/benchmarks.md: one call, under ten minutes on an H100 or H200, no network. PYTHON=... takes another
# interpreter than .venv's. `python benchmarks/gpu.py --tiny` tries the same at small sizes and keeps nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export CUBLAS_WORKSPACE_CONFIG=:4096:8  # without it PyTorch refuses matrix products where tests ask for the same bits
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}  # as trainer/run.py sets it
status=0
"$python" benchmarks/gpu.py --json benchmarks/results/gpu.json || status=$?
"$python" -c 'from benchmarks.page import write_page; write_page()'
exit "$status"
