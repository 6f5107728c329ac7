"""One environment from every launcher's."""

import os

import pytest
import torch

from model.errors import ConfigError
from trainer.launch import map_environment, threads_of_a_rank

OPENMPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
INTEL = {"PMI_RANK": "9", "PMI_SIZE": "16", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "8"}
SRUN = {"SLURM_PROCID": "9", "SLURM_NTASKS": "64", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "MASTER_ADDR": "node1", "MASTER_PORT": "20001"}
ONE_A_MACHINE = {**SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0",
                 "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
"""Of the helpers that an mpirun in a job starts by srun."""


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
