"""Looks at the node it runs on, and at the ways to all others: one line of JSON for `judge.py`.

    srun --ntasks-per-node=1 python tools/cluster/node_probe.py PLAN.json

Takes a second, and neither PyTorch nor a GPU's memory. Every node listens on the plan's port, greets every other one
and is told the time there; nothing waits longer than the plan's seconds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from trainer.data.config import DataConfig
from trainer.data.prepare import find_sources
from trainer.errors import DataError

_ROOT = Path(__file__).resolve().parents[2]
_SHARED_MEMORY_BYTES = 1e9
"""What NCCL needs between the GPUs of one node, with room to spare."""
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index,name,driver_version,ecc.errors.uncorrected.volatile.total,memory.used",
               "--format=csv,noheader,nounits")
_IDLE_GPU_MIB = 2048
"""What drivers and monitors may take of a GPU's memory; more belongs to a process that somebody left behind."""


def problems(plan: dict, node: str) -> Iterator[tuple[str, str]]:
    """(kind, what is wrong) of everything on this node that would stop or spoil a training."""
    for split in ("train", "valid"):
        yield from _unreadable(plan, split)
    yield from _unwritable(Path(plan["run_dir"]), plan["disk_bytes"], node)
    with contextlib.suppress(FileNotFoundError):
        free = shutil.disk_usage("/dev/shm").free
        if free < _SHARED_MEMORY_BYTES:
            yield "shared memory", f"/dev/shm has only {free / 1e9:.2f} GB free; 1 GB is needed"
    if plan["gpus"]:
        yield from _gpu_problems(plan["gpus"])
    for name in plan["nodes"]:
        try:
            socket.getaddrinfo(name, None)
        except OSError as error:
            yield "name resolution", f"cannot resolve {name}: {error.strerror}"


def _unreadable(plan: dict, split: str) -> Iterator[tuple[str, str]]:
    try:
        for source in find_sources(DataConfig.from_plain(plan["data"]), split):
            for path in sorted(source.iterdir()) if isinstance(source, Path) else source.files:
                with open(path, "rb") as file:
                    file.read(1)
    except (DataError, OSError) as error:
        yield "data", str(error)


def _unwritable(folder: Path, needed: float, node: str) -> Iterator[tuple[str, str]]:
    """Whether this node writes into the same folder as the first one, and whether checkpoints find room."""
    try:
        if not (folder / "logs").is_dir():  # the first node made it
            yield "run folder", f"{folder} is not the folder that the first node sees: it must be on a shared disk"
            return
        trial = folder / f".probe-{node}"
        trial.write_bytes(b"\0" * 4096)
        trial.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield "run folder", f"{folder} cannot be written: {error.strerror}"
        return
    if free < needed:
        yield "disk space", f"{folder} has {free / 1e9:.1f} GB free; two checkpoints take {needed / 1e9:.1f} GB"


def _gpus() -> list[list[str]]:
    """Index, name, driver version, uncorrected memory errors and used memory of every GPU that the driver finds."""
    try:
        printed = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in printed.splitlines()]
    return [row for row in rows if len(row) == 5 and row[0].isdigit()]


def _gpu_problems(expected: int) -> Iterator[tuple[str, str]]:
    gpus = _gpus()
    if len(gpus) < expected:
        yield "GPU", f"{len(gpus)} of {expected} GPUs"
    for index, _, _, errors, used in gpus:
        if errors.isdigit() and int(errors):  # "[N/A]" where it is not counted
            yield "GPU", f"GPU {index} has {errors} uncorrected memory errors"
        if used.isdigit() and int(used) > _IDLE_GPU_MIB:
            yield "GPU", f"{used} MiB of GPU {index} are in use by another process"


def facts() -> dict[str, str]:
    """What must be equal on all nodes."""
    code = hashlib.sha256()
    for path in sorted(path for room in ("model", "trainer") for path in (_ROOT / room).rglob("*.py")):
        code.update(path.read_bytes())
    packages = {package.metadata["Name"]: package.version for package in importlib.metadata.distributions()}
    kinds = {f"{name}, driver {driver}" for _, name, driver, *_ in _gpus()}
    return {**packages, "python": platform.python_version(), "libc": " ".join(platform.libc_ver()),
            "code of model/ and trainer/": code.hexdigest()[:12], "GPUs": "; ".join(sorted(kinds))}


class Mesh:
    """Greets all other nodes and is greeted by them. `clock_offset`: seconds that each other's clock is ahead.

    address: to listen at; empty for all of this machine's.
    """

    def __init__(self, node: str, others: list[str], port: int, seconds: float, address: str = ""):
        self.node, self.others, self.port, self.address = node, others, port, address
        self.deadline = time.monotonic() + seconds
        self.greeted_by: set[str] = set()
        self.unreached: dict[str, str] = {}
        self.clock_offset: dict[str, float] = {}

    def meet(self) -> None:
        with socket.create_server((self.address, self.port), backlog=256) as server:
            threading.Thread(target=self._answer, args=(server,), daemon=True).start()
            with ThreadPoolExecutor(max(1, min(32, len(self.others)))) as pool:
                list(pool.map(self._greet, self.others))
            while self.greeted_by < set(self.others) and time.monotonic() < self.deadline:
                time.sleep(0.02)

    def _answer(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed: the meeting is over
            while True:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(5)
                    name = connection.recv(256).decode().strip()
                    connection.sendall(f"{time.time()}\n".encode())
                    self.greeted_by.add(name)

    def _greet(self, other: str) -> None:
        while True:
            try:
                asked = time.time()
                with socket.create_connection((other, self.port), timeout=5) as connection:
                    connection.sendall(f"{self.node}\n".encode())
                    answer = connection.recv(256)
                self.clock_offset[other] = float(answer) - (asked + time.time()) / 2
                return
            except socket.gaierror as error:
                self.unreached[other] = f"cannot resolve it: {error.strerror}"
                return
            except (OSError, ValueError) as error:  # perhaps it does not listen yet
                if time.monotonic() > self.deadline:
                    self.unreached[other] = str(error) or "no answer"
                    return
                time.sleep(0.1)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    node = os.environ["SLURMD_NODENAME"]
    found = list(problems(plan, node))
    mesh = Mesh(node, [name for name in plan["nodes"] if name != node], plan["port"], plan["seconds"])
    mesh.meet()
    unheard = sorted(set(mesh.others) - mesh.greeted_by)
    print(json.dumps({"node": node, "problems": found, "facts": facts(), "unreached": mesh.unreached,
                      "unheard": unheard, "clock_offset": mesh.clock_offset}), flush=True)


if __name__ == "__main__":
    main()
