#!/bin/bash
# Train on one node of 8 GPUs:  sbatch slurm/train_1node.sh --preset base --run_dir /shared/runs/base
#
# Start it from the root of the repository. Arguments go to trainer/run.py
# (--ds_config defaults to ds_configs/zero2.json); every value below can be given to sbatch instead, before the script:
#   sbatch --gpus-per-node=4 --ntasks-per-node=4 --time=4:00:00 --partition=h100 slurm/train_1node.sh ...
# Where requeueing is forbidden, a chain of jobs, one after the other, does the same:
#   sbatch --array=1-10%1 --no-requeue slurm/train_1node.sh ...
# What differs between clusters: slurm/site.env.example. How a job is doing: slurm/status.sh JOB. More: docs/cluster.md.
#SBATCH --job-name=diffusion-lm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# USR1 comes ten minutes before the limit and on preemption: the ranks save, and the job is queued again. With a limit
# that is hardly longer, give sbatch --signal=B:USR1@60 as well.
#SBATCH --signal=B:USR1@600
cd "${SLURM_SUBMIT_DIR:?start this script with sbatch, from the root of the repository}" || exit
# shellcheck source=slurm/lib/job.sh
. slurm/lib/job.sh
