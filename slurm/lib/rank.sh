#!/usr/bin/env bash
# One rank: sets what differs from rank to rank, then becomes the program, so that its signals and exit code are its own.
#   srun slurm/lib/rank.sh python trainer/run.py ...
set -euo pipefail

# Until the program's own handlers are there, a request to save must not end it; slurm/lib/job.sh asks again.
trap '' USR1 USR2

# Compiled kernels on the node's own disk: a folder for each rank, because ranks that compile at once corrupt each other's;
# one for each attempt, because a compiler that was killed leaves a lock on which the next start would wait for ever.
caches=${NODE_CACHES:?set by slurm/lib/job.sh}/rank-$SLURM_PROCID
export TRITON_CACHE_DIR=$caches/triton TORCHINDUCTOR_CACHE_DIR=$caches/inductor TORCH_EXTENSIONS_DIR=$caches/extensions
mkdir -p "$caches"

printf 'rank %s of %s on %s\n' "$SLURM_PROCID" "$SLURM_NTASKS" "$SLURMD_NODENAME"
exec "$@"
