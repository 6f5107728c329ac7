#!/usr/bin/env bash
# Runs on the node after each rank, however it ended: removes what rank.sh had it compile.
rm -rf "${NODE_CACHES:?set by slurm/lib/job.sh}/rank-$SLURM_PROCID"
rmdir "$NODE_CACHES" 2>/dev/null || true # the last rank of the node
