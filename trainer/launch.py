"""From any launcher's environment to a process group: `deepspeed`, `torchrun`, `mpirun`, `srun` or plain `python`.

Everything that must happen before DeepSpeed's first collective happens here.
"""

from __future__ import annotations

import importlib
import os
import re
import socket
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch

from model.errors import ConfigError
from trainer import failure

warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)

_RANK_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)
"""Rank, world, rank on this machine, ranks on this machine: of OpenMPI; of MPICH and Intel MPI; of a step of SLURM's
srun (a batch script is none, and has no SLURM_STEP_*). SLURM's come last: in a job an mpirun may start its helpers by
srun, one a machine, whose ranks the ranks then inherit. srun's own PMI names no rank on the machine."""
_RANKS_HERE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", *(names[3] for names in _RANK_VARIABLES))
"""Ranks on this machine, as torchrun, deepspeed and those say it; SLURM's looks like 8(x2)."""
_SHORTEST, _NEVER = timedelta(minutes=10), timedelta(days=7)
"""Time limits of collectives: the least, and what stands for none."""


class NoGPUError(ConfigError):
    """A rank without a GPU of its own. The others may have theirs, and only wait for it: it must speak itself."""


@dataclass(frozen=True)
class Ranks:
    """This process's place: rank of world, and the device it computes on."""

    rank: int
    world: int
    device: torch.device
    control: torch.distributed.ProcessGroup
    """A gloo group of all ranks, for decisions that must not wait for the GPU's queue."""

    @property
    def first(self) -> bool:
        return self.rank == 0


def map_environment() -> None:
    """Gives RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* their values from whichever launcher started this process.

    ConfigError where ranks on several machines were not told where the first one is.
    """
    env = os.environ
    several_machines = False
    if "RANK" not in env:
        for rank, world, local, on_this_machine in _RANK_VARIABLES:
            if rank in env and world in env and local in env:
                env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = env[rank], env[world], env[local]
                several_machines = env.get(on_this_machine, env[world]) != env[world]
                break
        else:
            env["RANK"] = "0"
            env.setdefault("WORLD_SIZE", "1")  # a dry run may ask for more
    env.setdefault("LOCAL_RANK", "0")
    if several_machines and "MASTER_ADDR" not in env:
        raise ConfigError("MASTER_ADDR", "is not set, but the ranks are on several machines: export the name of the "
                          "first rank's (OpenMPI: mpirun -x MASTER_ADDR=NODE ...; SLURM: see slurm/train_8node.sh)")
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(_free_port()) if env["WORLD_SIZE"] == "1" else "29500"


def on_gpus() -> bool:
    """Whether this machine's ranks compute on GPUs: where PyTorch finds any, unless DS_ACCELERATOR is cpu."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def device_of_rank(local_rank: int) -> torch.device:
    """What the rank with this number on its machine computes on: the GPU of the same number, or the only one that it
    sees (srun --gpus-per-task=1 shows each task its own).

    NoGPUError where the rank sees several GPUs, but none for it.
    """
    if not on_gpus():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    index = 0 if visible == 1 else local_rank
    if index >= visible:
        raise NoGPUError("LOCAL_RANK", f"is {local_rank}, but this rank sees {visible} GPUs: start as many ranks on a "
                         "machine as it has GPUs, or let them see more of them (CUDA_VISIBLE_DEVICES)")
    return torch.device("cuda", index)


def time_limit(hang_minutes: float) -> timedelta:
    """Of a collective, for a run with this train.hang_minutes: later than its watchdog, which names the culprits."""
    return max(_SHORTEST, 2 * timedelta(minutes=hang_minutes)) if hang_minutes > 0 else _NEVER


def start(limit: timedelta = _SHORTEST) -> Ranks:
    """Joins the process group (NCCL on GPUs, gloo otherwise). Every path of the program ends with `stop`.

    limit: after so long a collective that is not complete fails, in whichever process group.
    NoGPUError as `device_of_rank`; ConfigError where the ranks cannot meet because MASTER_PORT is taken.
    """
    map_environment()
    device = device_of_rank(int(os.environ["LOCAL_RANK"]))
    cuda = device.type == "cuda"
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_of_a_rank())
    import deepspeed

    if not cuda:
        # Only DeepSpeed's inference all-reduce uses this C++ op, yet init_distributed compiles it at once; an
        # interrupted compilation leaves a lock that hangs every later start.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    if cuda:
        torch.cuda.set_device(device)
        # DeepSpeed takes the device's number from LOCAL_RANK, which OpenMPI's must then equal.
        names = {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys()
        os.environ.update(dict.fromkeys(names, str(device.index)))
    # DeepSpeed makes groups of its own, for ZeRO and for experts, and names no limit for them.
    defaults = torch.distributed.distributed_c10d
    defaults.default_pg_timeout = defaults.default_pg_nccl_timeout = limit
    try:
        deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False, timeout=limit)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError("MASTER_PORT", f"{os.environ['MASTER_PORT']} is taken, probably by another run on this "
                          "machine: give the launcher another --master_port (torchrun: --master-port), or set "
                          "MASTER_PORT") from error
    control = torch.distributed.group.WORLD
    if cuda:
        control = torch.distributed.new_group(backend="gloo", timeout=limit)
    failure.watch()
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device, control)


def threads_of_a_rank() -> int:
    """PyTorch's own choice, but no more than this machine has for each of its ranks: threads that wait for each
    other's cores are slower than fewer threads."""
    for name in _RANKS_HERE:
        if name in os.environ:
            ranks = int(re.match(r"\d+", os.environ[name])[0])
            return min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // ranks))
    return torch.get_num_threads()


def stop() -> None:
    """Leaves the process group together. Without it gloo's threads may abort a process that has succeeded."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        failure.dismiss()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
