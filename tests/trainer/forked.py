"""Runs `trainer/run.py` on many ranks quickly: each is forked from a process that has the program's modules loaded."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def launcher():
    """Starts processes in a fraction of the time that a fresh interpreter takes to import PyTorch and DeepSpeed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("forkserver")
        # DeepSpeed loads PyTorch's compiler for Muon, whatever optimizer it is given.
        context.set_forkserver_preload(["trainer.loop", "datasets", "deepspeed.runtime.zero.muon.muon_optimizer",
                                        __name__])
        yield context


def launch(launcher, folder: Path, command: list[str], world: int, seconds: float,
           port: int = 0, rank_main: Callable | None = None) -> tuple[list[int], list[str]]:
    """(exit codes, outputs) of all ranks of `trainer/run.py command` in `folder`; None is the exit code of a rank
    that did not end within `seconds`. port: the first rank's; a free one if 0. rank_main: in place of `run_rank`,
    which it may call."""
    port = port or free_port()
    codes = join([launcher.Process(target=rank_main or run_rank, args=(command, folder, rank, world, port))
                  for rank in range(world)], seconds)
    return codes, [(folder / f"rank{rank}.txt").read_text() for rank in range(world)]


def join(ranks: list[multiprocessing.Process], seconds: float) -> list[int | None]:
    """Starts processes and waits for all of them; their exit codes, None of one that did not end within `seconds`."""
    for process in ranks:
        process.start()
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes


def run_rank(command: list[str], folder: Path, rank: int, world: int, port: int) -> None:
    """One rank of trainer/run.py, in a process of its own that has the program's modules loaded already."""
    os.chdir(folder)
    output = os.open(folder / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["trainer/run.py", *command]
    from trainer import run, run_folder
    run_folder._LOCK_SECONDS = 1  # to wait for a folder in use
    run.main()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
