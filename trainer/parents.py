"""No rank outlives its launcher: a thread that notices when it has died, asks to stop, and sees to it.

`deepspeed` is ended by TERM without a word to the processes it started, and any launcher by KILL. Their ranks would
go on, holding the machine.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from trainer.errors import ExitCode
from trainer.signals import ORPHANED, StopRequest

_LAUNCHER = re.compile(r"(deepspeed|torchrun|torch\.distributed|mpirun|mpiexec|orterun|prterun|orted|prted"
                       r"|hydra_pmi_proxy|srun|slurmstepd)(\.[\w.]+|: .*)?")
_LOOK_EVERY = 1.0
GRACE = 20.0
"""Seconds in which a run whose launcher has died may save; then the rank ends as it is."""


class _Process(NamedTuple):
    number: int
    started: str
    """In the kernel's clock: tells a process from a later one with its number."""


def watch_launchers(stop: StopRequest) -> None:
    """Starts the thread, if a launcher is found among the processes above this one. A shell above them may end: a run
    in the background is meant to outlive it."""
    launchers = _launchers()
    if launchers:
        threading.Thread(target=_watch, args=(launchers, stop), name="launcher's end", daemon=True).start()


def _watch(launchers: list[_Process], stop: StopRequest) -> None:
    while all((now := _stat(each.number)) is not None and now[0] == each for each in launchers):
        time.sleep(_LOOK_EVERY)
    stop.ask(ORPHANED)
    os.kill(os.getpid(), signal.SIGTERM)  # as the launcher should have done
    time.sleep(GRACE)
    print("error: the launcher has ended, and this rank could not save in time", file=sys.stderr, flush=True)
    os._exit(ExitCode.COMMUNICATION)


def _launchers() -> list[_Process]:
    """The unbroken line of launchers above this process, nearest first."""
    found: list[_Process] = []
    parent = os.getppid()
    while (stat := _stat(parent)) is not None and _is_launcher(parent):
        process, parent = stat
        found.append(process)
    return found


def _is_launcher(number: int) -> bool:
    try:
        words = Path(f"/proc/{number}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    # The program, or what an interpreter is told to run: `python -m torch.distributed.run`, `python …/bin/deepspeed`.
    return any(_LAUNCHER.fullmatch(Path(word).name) for word in words[:4])


def _stat(number: int) -> tuple[_Process, int] | None:
    """The process and the number of its parent; None if it has ended."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    if fields[0] in "ZX":
        return None
    return _Process(number, fields[19]), int(fields[1])
