#!/usr/bin/env bash
# One line about a job of slurm/train_*.sh, running or ended:  slurm/status.sh JOB
# State, step, loss, speed, newest checkpoint, and the rank that failed first with its error. Start it where you started
# the job, on any machine that sees the run folder and has the job's Python (slurm/site.env).
set -euo pipefail
job=${1:?usage: slurm/status.sh JOB}
cd "$(dirname "$0")/.."
# shellcheck source=slurm/lib/site.sh
. slurm/lib/site.sh
logs=$(readlink ".cache/jobs/$job") || {
    echo "job $job has not started from $PWD$(squeue --noheader --jobs="$job" --format=' (%T: %r)' 2>/dev/null || true)" >&2
    exit 1
}
command -v "$python" >/dev/null || {
    echo "error: PYTHON: there is no $python on this machine: name one in slurm/site.env that is there" >&2
    exit 80
}
state=$(scontrol -o show job "$job" 2>/dev/null | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p' | head -n 1)
run_dir=$(dirname "$(dirname "$(dirname "$logs")")")
status=$("$python" tools/cluster/progress.py status "$run_dir" "$logs")
echo "job $job ${state:-ended} ($(basename "$logs")) | $status"
