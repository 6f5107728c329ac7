#!/bin/bash
# Train on 8 nodes of 8 GPUs:  sbatch slurm/train_8node.sh --preset base --run_dir /shared/runs/base
# Arguments go to trainer/run.py (--ds_config defaults to ds_configs/zero2.json). Any #SBATCH value can be given to
# sbatch instead, before the script: sbatch --nodes=2 --time=4:00:00 slurm/train_8node.sh ...
#SBATCH --job-name=diffusion-lm
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# USR1 reaches every rank five minutes before the limit: the run saves and ends with code 0; submit again to continue.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this script with sbatch, from the root of the repository}"

python=${PYTHON:-.venv/bin/python}
# The first node leads. Ports below 32768 are not handed out by the system; the job's number keeps jobs apart.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# srun no longer takes the job's --cpus-per-task by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# One task a GPU; trainer/launch.py reads rank, size and local rank from SLURM's variables. Neither ssh nor a hostfile.
# When one rank fails, the others are ended instead of waiting for it.
exec srun --kill-on-bad-exit=1 --wait=60 --unbuffered \
    "$python" -u trainer/run.py --ds_config ds_configs/zero2.json "$@"
