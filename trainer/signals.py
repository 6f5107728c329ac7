"""Requests to stop or to save: signals, files in the run folder, the time budget; agreed on by all ranks."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

HANDLED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
STOP_FILE, SAVE_FILE = "stop", "save"
"""Made by the user in the run folder (`touch RUN/stop`), removed by the run when it acts on them."""
_BY_FILE = f"the file {STOP_FILE}"
_LOOK_EVERY = 1.0  # seconds between looks for these files: a look may be a message to a file server


class StopRequested(BaseException):
    """Leaves what is being done because the run is to stop. Not an Exception: a signal may raise it anywhere, where it
    must not be taken for an error of what is being done."""


class StopRequest:
    """Set by a signal, a file or the time budget of this process; agreed on by all ranks.

    A handler that saved would deadlock, because saving is a collective and signals reach ranks at different steps.
    """

    def __init__(self, max_minutes: float = 0.0):
        self.reason: str | None = None
        self._save = False
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes > 0 else None
        self._folder: Path | None = None
        self._looked = 0.0
        self._raises = False

    def install(self) -> None:
        for number in HANDLED:
            signal.signal(number, self._on_signal)

    @staticmethod
    def dismiss() -> None:
        """The run is over: from here on requests are ignored. Python takes its handlers away before the process ends,
        and a request that is repeated would then kill it, as if it had failed."""
        for number in HANDLED:
            signal.signal(number, signal.SIG_IGN)

    def watch_folder(self, folder: Path) -> None:
        """Looks for the files from now on; one rank does."""
        self._folder = folder

    def _on_signal(self, number: int, frame: object) -> None:
        self.ask(signal.Signals(number).name)
        if self._raises:
            self._raises = False  # once: what it leaves has to be tidied up
            raise StopRequested

    def ask(self, reason: str) -> None:
        """Asks this rank to stop; it tells the others at the next agreement."""
        self.reason = self.reason or reason

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside the block a signal raises StopRequested instead of waiting for an agreement: for work that ranks do
        without each other and that may be interrupted anywhere."""
        self._raises = True
        try:
            if self.reason is not None:
                raise StopRequested
            yield
        finally:
            self._raises = False

    @property
    def by_file(self) -> bool:
        """Whether it was the user's file that asked: then nobody wants the run started again by itself."""
        return self.reason == _BY_FILE

    @property
    def wanted(self) -> bool:
        """Whether this rank was asked to stop."""
        self._look()
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.ask("time budget")
        return self.reason is not None

    def take_save(self) -> bool:
        """Whether this rank was asked to save since the last call."""
        self._look()
        asked, self._save = self._save, False
        return asked

    def _look(self) -> None:
        if self._folder is None or time.monotonic() - self._looked < _LOOK_EVERY:
            return
        self._looked = time.monotonic()
        if (self._folder / STOP_FILE).exists():
            (self._folder / STOP_FILE).unlink(missing_ok=True)
            self.ask(_BY_FILE)
        if (self._folder / SAVE_FILE).exists():
            (self._folder / SAVE_FILE).unlink(missing_ok=True)
            self._save = True

    def agree(self, anyone: bool) -> bool:
        """Takes note of whether any rank was asked to stop, which all ranks have been told; returns it."""
        if anyone:
            self.ask("another rank's request")
        return anyone  # even if a signal came in between: the other ranks do not know of it yet

    def agreed(self, group: torch.distributed.ProcessGroup) -> bool:
        """True on every rank if any rank was asked to stop. A collective: all ranks call it at the same place."""
        flag = torch.tensor([self.wanted], dtype=torch.uint8)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=group)
        return self.agree(bool(flag.item()))

    def check(self, group: torch.distributed.ProcessGroup) -> None:
        """Raises StopRequested on every rank if any rank was asked to stop. A collective."""
        if self.agreed(group):
            raise StopRequested
