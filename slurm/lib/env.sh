# shellcheck shell=bash
# Settings of Python, PyTorch and NCCL for every rank. What is already set, by you or by slurm/site.env, stays.

# Threads of a rank for work on the CPU: its share of the cores. The default, all cores, would start cores x ranks of them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# From version 22.05 on srun does not take the job's --cpus-per-task by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# A rank that is killed has written its log up to the last line.
export PYTHONUNBUFFERED=1
# A crash in native code leaves the Python stack in the rank's log.
export PYTHONFAULTHANDLER=1

# NCCL says what went wrong; INFO, for one run, also says which network it takes.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# The flight recorder keeps the last collectives of a rank; on a time-out every rank writes them to the attempt's folder
# flight/, and `torchfrtrace --prefix rank_ FOLDER` says which rank did not come to which collective.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-20000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# The recorder needs up to this long to write before the process is ended; the default is too short for a busy disk.
export TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC=${TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC:-60000}
# A rank whose NCCL thread itself is stuck ends after this long instead of holding the job until its limit.
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-600}
