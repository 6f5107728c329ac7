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
_BY_FILE, BUDGET, ORPHANED = f"the file {STOP_FILE}", "time budget", "the launcher has ended"
REASONS = (None, ORPHANED, *(number.name for number in HANDLED if number != signal.SIGINT), BUDGET,
           signal.SIGINT.name, _BY_FILE)
"""What a stop can come from; of several ranks' reasons the last here is that of all. Those that come from the user
outrank a cluster's, which would start the run again."""
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
        """Asks this rank to stop, for one of REASONS; it tells the others at the next agreement."""
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
            self.ask(BUDGET)
        return self.reason is not None

    @property
    def wish(self) -> int:
        """Why this rank was asked to stop, as a place in REASONS; 0 if it was not."""
        return REASONS.index(self.reason) if self.wanted else 0

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

    def agree(self, wish: int) -> bool:
        """Takes note of the greatest wish of all ranks, which all have been told; returns whether it is to stop."""
        if wish:
            self.reason = REASONS[wish]
        return wish > 0  # even if a signal came in between: the other ranks do not know of it yet

    def agreed(self, group: torch.distributed.ProcessGroup) -> bool:
        """True on every rank if any rank was asked to stop. A collective: all ranks call it at the same place."""
        wish = torch.tensor([self.wish], dtype=torch.uint8)
        torch.distributed.all_reduce(wish, op=torch.distributed.ReduceOp.MAX, group=group)
        return self.agree(int(wish.item()))

    def check(self, group: torch.distributed.ProcessGroup) -> None:
        """Raises StopRequested on every rank if any rank was asked to stop. A collective."""
        if self.agreed(group):
            raise StopRequested
