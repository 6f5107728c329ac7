"""Tries the ranks' devices and the collectives that training lives on: lines of JSON for `judge.py`.

    srun ... python tools/cluster/rank_probe.py PLAN.json        with the same shape as the training itself

Each rank says which stage it has come through. A rank that is stuck in one is ended, with its stack, after the plan's
seconds for each of the stages.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import faulthandler
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from trainer.launch import device_of_rank, map_environment

STAGES = ("device", "store", "group", "all_reduce", "all_to_all")
_ELEMENTS = 1 << 20


@contextmanager
def stage(name: str, place: dict, seconds: float) -> Iterator[None]:
    """Around one stage: bounded in time, and its outcome printed. A failure ends the process at once, because the way
    through the group's destructor may be blocked by ranks that are stuck."""
    faulthandler.dump_traceback_later(seconds + 5, exit=True)
    began = time.perf_counter()
    try:
        yield
    except Exception as error:
        print(json.dumps({**place, "failed": name, "error": " ".join(str(error).split())}), flush=True)
        os._exit(1)
    print(json.dumps({**place, "passed": name, "seconds": round(time.perf_counter() - began, 4)}), flush=True)


def working_device(local_rank: int, gpus: int) -> torch.device:
    """This rank's device, after a product of matrices with an exact result."""
    device = device_of_rank(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif gpus and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise RuntimeError("PyTorch finds no GPU (its build, the driver or CUDA_VISIBLE_DEVICES); to train on CPUs "
                           "export DS_ACCELERATOR=cpu")
    side = 8192 if device.type == "cuda" else 256
    ones = torch.ones(side, side, device=device)
    if not bool((ones @ ones == side).all()):
        raise RuntimeError("a product of matrices came out wrong")
    return device


def check_all_reduce(rank: int, world: int, device: torch.device) -> None:
    values = torch.full((_ELEMENTS,), float(rank + 1), device=device)
    dist.all_reduce(values)
    if not bool((values == world * (world + 1) / 2).all()):
        raise RuntimeError("the sum over all ranks came out wrong")


def check_all_to_all(rank: int, world: int, device: torch.device) -> None:
    """Every rank sends a different amount to every other, as routed tokens do."""
    counts = torch.arange(1, world + 1)
    sent = torch.full((int(counts.sum()),), float(rank), device=device)
    received = torch.empty((rank + 1) * world, device=device)
    dist.all_to_all_single(received, sent, [rank + 1] * world, counts.tolist())
    if not bool((received.view(world, rank + 1) == torch.arange(world, device=device)[:, None]).all()):
        raise RuntimeError("the exchange between all ranks came out wrong")


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    map_environment()
    rank, world, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    timeout = timedelta(seconds=plan["seconds"])
    bounded = partial(stage, place={"node": os.environ["SLURMD_NODENAME"], "rank": rank}, seconds=plan["seconds"])
    with bounded("device"):
        device = working_device(local_rank, plan["gpus"])
    with bounded("store"):
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, rank == 0, timeout)
    with bounded("group"):
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=timeout,
                                device_id=device if cuda else None)
    with bounded("all_reduce"):
        check_all_reduce(rank, world, device)
    with bounded("all_to_all"):
        check_all_to_all(rank, world, device)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
