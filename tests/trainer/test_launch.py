"""One environment from every launcher's."""

import os
from datetime import timedelta

import deepspeed
import pytest
import torch

from model.errors import ConfigError
from trainer import failure
from trainer.launch import NoGPUError, Ranks, device_of_rank, map_environment, start, threads_of_a_rank, time_limit

OPENMPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
INTEL = {"PMI_RANK": "9", "PMI_SIZE": "16", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "8"}
SRUN = {"SLURM_PROCID": "9", "SLURM_NTASKS": "64", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "MASTER_ADDR": "node1", "MASTER_PORT": "20001"}
ONE_A_MACHINE = {**SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0",
                 "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
"""Of the helpers that an mpirun in a job starts by srun."""
DEFAULT_LIMITS = ("default_pg_timeout", "default_pg_nccl_timeout")
"""What PyTorch gives a group for which no limit is named."""


def mapped(monkeypatch, given: dict[str, str]) -> tuple[str, ...]:
    monkeypatch.setattr(os, "environ", dict(given))
    map_environment()
    return tuple(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


@pytest.mark.parametrize("given, expected", [
    ({}, ("0", "1", "0", "127.0.0.1")),
    ({"WORLD_SIZE": "64"}, ("0", "64", "0", "127.0.0.1")),  # a dry run
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **SRUN}, ("1", "2", "1", "node1")),  # torchrun under srun
    (OPENMPI, ("3", "4", "1", "127.0.0.1")),
    ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "a"}, ("3", "4", "1", "a")),
    ({**INTEL, "MPI_LOCALNRANKS": "16"}, ("9", "16", "1", "127.0.0.1")),
    (SRUN, ("9", "16", "1", "node1")),
    ({**ONE_A_MACHINE, **INTEL}, ("9", "16", "1", "node1")),
    # srun's own PMI names no local rank, and a batch script is no task of a step.
    ({**SRUN, "PMI_RANK": "9", "PMI_SIZE": "16"}, ("9", "16", "1", "node1")),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "64", "SLURM_LOCALID": "0"}, ("0", "1", "0", "127.0.0.1")),
])
def test_environment(monkeypatch, given, expected):
    assert mapped(monkeypatch, given) == expected


@pytest.mark.parametrize("given, expected", [
    ({}, 6), ({"LOCAL_SIZE": "2"}, 4), ({"LOCAL_WORLD_SIZE": "1"}, 6), (OPENMPI, 2), (SRUN, 1),
    ({**ONE_A_MACHINE, **INTEL}, 1),
    ({"LOCAL_SIZE": "64"}, 1)])
def test_ranks_share_the_cores(monkeypatch, given, expected):
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert threads_of_a_rank() == expected


@pytest.mark.parametrize("given", [{**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
                                   {name: value for name, value in SRUN.items() if name != "MASTER_ADDR"}])
def test_ranks_on_several_machines_must_know_the_first(monkeypatch, given):
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        mapped(monkeypatch, given)


@pytest.fixture
def gpus(monkeypatch):
    """Makes this machine look like one with so many GPUs, and `start` join no ranks; what it asked for, by name."""
    def seem(count: int, environment: dict[str, str]) -> dict:
        asked = {}
        monkeypatch.setattr(os, "environ", dict(environment))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
        monkeypatch.setattr(deepspeed, "init_distributed", lambda backend, **more: asked.update(more, backend=backend))
        monkeypatch.setattr(torch.distributed, "new_group", lambda **more: asked.update(control=more))
        monkeypatch.setattr(failure, "watch", lambda: None)
        for name in DEFAULT_LIMITS:
            monkeypatch.setattr(torch.distributed.distributed_c10d, name, None)
        return asked

    return seem


@pytest.mark.parametrize("count, local_rank, environment, expected", [
    (8, 3, {}, "cuda:3"), (1, 0, {}, "cuda:0"), (1, 3, {}, "cuda:0"), (8, 3, {"DS_ACCELERATOR": "cuda"}, "cuda:3"),
    (8, 3, {"DS_ACCELERATOR": "cpu"}, "cpu")])
def test_the_device_of_a_rank(gpus, count, local_rank, environment, expected):
    gpus(count, environment)
    assert device_of_rank(local_rank) == torch.device(expected)


def test_a_rank_without_a_gpu_says_so(gpus):
    gpus(4, {})
    with pytest.raises(NoGPUError, match=r"^LOCAL_RANK: is 4, but this rank sees 4 GPUs: start as many ranks"):
        device_of_rank(4)


@pytest.mark.parametrize("count, index", [(4, "1"), (1, "0")])
def test_deepspeed_is_told_the_number_of_the_gpu(gpus, count, index):
    asked = gpus(count, {**OPENMPI, "MASTER_PORT": "20001"})
    ranks = start()
    assert isinstance(ranks, Ranks) and (ranks.rank, ranks.world) == (3, 4)
    assert ranks.device == asked["device"] == torch.device(f"cuda:{index}") and asked["backend"] == "nccl"
    assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == index


@pytest.mark.parametrize("hang_minutes, minutes", [(10, 20), (45.5, 91), (0.1, 10), (0, 7 * 24 * 60)])
def test_the_watchdog_comes_before_the_limit_of_every_group(gpus, hang_minutes, minutes):
    asked, limit = gpus(4, {**OPENMPI, "MASTER_PORT": "20001"}), timedelta(minutes=minutes)
    start(time_limit(hang_minutes))
    assert asked["timeout"] == limit and asked["control"] == {"backend": "gloo", "timeout": limit}
    assert [getattr(torch.distributed.distributed_c10d, name) for name in DEFAULT_LIMITS] == [limit, limit]


def test_pytorch_looks_for_the_default_limit_where_it_is_put(monkeypatch):
    for name in DEFAULT_LIMITS:
        monkeypatch.setattr(torch.distributed.distributed_c10d, name, timedelta(minutes=77))
    for backend in ("gloo", "nccl"):
        assert torch.distributed.distributed_c10d._get_default_timeout(backend) == timedelta(minutes=77)
