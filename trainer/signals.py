"""Requests to stop: a signal sets a flag, the ranks agree on it between steps, and save together."""

from __future__ import annotations

import signal
import time

import torch

HANDLED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Set by a signal or by the time budget of this process; agreed on by all ranks.

    A handler that saved would deadlock, because saving is a collective and signals reach ranks at different steps.
    """

    def __init__(self, max_minutes: float = 0.0):
        self.reason: str | None = None
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes > 0 else None

    def install(self) -> None:
        for number in HANDLED:
            signal.signal(number, self._on_signal)

    @staticmethod
    def dismiss() -> None:
        """The run is over: from here on requests are ignored. Python takes its handlers away before the process ends,
        and a request that is repeated would then kill it, as if it had failed."""
        for number in HANDLED:
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: object) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def agreed(self, group: torch.distributed.ProcessGroup) -> bool:
        """True on every rank if any rank was asked to stop. A collective: all ranks call it at the same place."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = self.reason or "time budget"
        flag = torch.tensor([self.reason is not None], dtype=torch.uint8)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=group)
        if not flag.item():
            return False  # even if a signal came in between: the other ranks do not know of it yet
        self.reason = self.reason or "another rank's request"
        return True
