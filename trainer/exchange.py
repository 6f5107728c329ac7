"""What the ranks tell each other once a step, in one small message: loss, wishes, and how long they took."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

from trainer.launch import Ranks


@dataclass(frozen=True)
class Report:
    """One rank's report on one step."""

    loss: float
    """Its share of the step's loss."""
    stop: int
    """Why it was asked to stop, as `StopRequest.wish` says it; 0 if it was not."""
    save: bool
    """It was asked to save."""
    seconds: float
    """Time it took for its data and forward passes, before it had to wait for others' gradients."""


def exchange(mine: Report, ranks: Ranks) -> list[Report]:
    """Every rank's report, in the order of ranks. A collective."""
    table = torch.zeros(ranks.world, len(astuple(mine)), dtype=torch.float64)
    table[ranks.rank] = torch.tensor([float(value) for value in astuple(mine)], dtype=torch.float64)
    torch.distributed.all_reduce(table, group=ranks.control)
    return [Report(loss, int(stop), bool(save), seconds) for loss, stop, save, seconds in table.tolist()]
