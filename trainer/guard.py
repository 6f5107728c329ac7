"""Steps that must not be applied: a loss that is not finite, or that leaps far above the losses before it.

Every rank judges the same numbers (`trainer/exchange.py`) and so comes to the same verdict.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

WINDOW = 128
"""Losses of applied steps that a new one is compared with."""
LEAST = 32
"""A spike is only called so after this many of them."""
_NORMAL = 1.4826
"""Median absolute deviation -> standard deviation, for normally distributed values."""
_FLOOR = 0.01
"""Share of the median that the deviation is taken to be at least: losses may be almost constant."""


@dataclass(frozen=True)
class Trouble:
    """Why a step is skipped, and the ranks whose share of the loss, or whose gradients, show it."""

    what: str
    ranks: list[int]


class Guard:
    """Decides which steps are skipped, and counts them.

    spike_limit: a loss is a spike if it exceeds the median of the last WINDOW applied losses by more than this many
    standard deviations, these estimated from the median absolute deviation, which a few outliers do not widen; 0: no
    loss is a spike. Losses of skipped steps do not enter the window. A loss may fall as fast as it likes.
    """

    def __init__(self, spike_limit: float):
        self._limit = spike_limit
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.skipped = self.in_a_row = 0

    def judge(self, share_W: list[float]) -> Trouble | None:
        """share_W: every rank's share of the loss, which is their sum."""
        broken = [rank for rank, share in enumerate(share_W) if not math.isfinite(share)]
        if broken:
            return Trouble("the loss is not finite", broken)
        loss = sum(share_W)
        if self._limit > 0 and len(self._losses) >= LEAST:
            middle = median(self._losses)
            deviation = _NORMAL * median(abs(loss - middle) for loss in self._losses)
            highest = middle + self._limit * max(deviation, _FLOOR * abs(middle))
            if loss > highest:
                return Trouble(f"the loss is {loss:.4g}, more than {highest:.4g}",
                               [max(range(len(share_W)), key=share_W.__getitem__)])
        return None

    def applied(self, loss: float) -> None:
        """The step was applied."""
        self._losses.append(loss)
        self.in_a_row = 0

    def skip(self) -> None:
        """The step was skipped."""
        self.skipped += 1
        self.in_a_row += 1

    def state(self) -> dict:
        """Plain values; the same on all ranks."""
        return {"losses": list(self._losses), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load(self, state: dict) -> None:
        """Restores what `state` returned."""
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
