"""Time sampling by the second moment of the loss, as improved-diffusion and the original DiffuSeq do it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.batch import PackedBatch

if TYPE_CHECKING:
    from model.diffusion_lm import BatchPlan, LossReport, NoiseDraw

KEPT = 10
"""Losses that are remembered of each step."""
UNIFORM_SHARE = 0.001
"""Share of the draws that is spread evenly over all steps."""


class LossSecondMoment:
    """Draws the steps 0..T-1 of discrete time in proportion to sqrt(mean loss^2) of their last ten losses (Nichol &
    Dhariwal 2021, section 3.3, equation 18), once each has as many; evenly until then.

    A loss counts by its importance weight 1 / (T p_step), so that its expectation is that of even draws. Everything
    is float64 on the CPU. `seen_T` counts each step's losses so far; the n-th of them stands in `losses_TK` at n mod
    KEPT until another takes its place.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self.losses_TK = torch.zeros(steps, KEPT, dtype=torch.float64)
        self.seen_T = torch.zeros(steps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """p [T]."""
        if (self.seen_T < KEPT).any():
            return torch.full((self.steps,), 1 / self.steps, dtype=torch.float64)
        moment_T = self.losses_TK.square().mean(1).sqrt()
        return moment_T / moment_T.sum() * (1 - UNIFORM_SHARE) + UNIFORM_SHARE / self.steps

    def draw(self, uniform_C: Tensor) -> Tensor:
        """From even numbers in [0, 1), the times [C], in the middle of their steps."""
        step_C = torch.searchsorted(self.probabilities().cumsum(0), uniform_C.double(), right=True)
        return ((step_C.clamp(max=self.steps - 1) + 0.5) / self.steps).float()

    def weights(self, time_C: Tensor) -> Tensor:
        """By how much the losses at these times count [C]."""
        return (1 / (self.steps * self.probabilities()[(time_C * self.steps).long()])).float()

    def measure(self, batch: PackedBatch, plan: BatchPlan, draw: NoiseDraw, report: LossReport) -> Tensor:
        """float64 [2, strata]: time and loss of a micro-batch's copies at their places in the global batch, zeros
        elsewhere. To be added up over micro-batches and ranks."""
        measured = torch.zeros(2, batch.strata, dtype=torch.float64, device=report.loss_C.device)
        measured[:, batch.stratum_C] = torch.stack((draw.time_C, report.loss_C)).double()
        return measured

    def observe(self, measured: Tensor) -> None:
        """Learns from what was measured in one step of training, all of the global batch."""
        time_N, loss_N = measured.cpu()
        self.remember((time_N * self.steps).long(), loss_N)

    def remember(self, step_N: Tensor, loss_N: Tensor) -> None:
        """Keeps the losses of steps, in the order given."""
        order_N = torch.argsort(step_N, stable=True)
        step_N, loss_N = step_N[order_N], loss_N[order_N]
        new_T = torch.bincount(step_N, minlength=self.steps)
        place_N = torch.arange(len(step_N)) - (new_T.cumsum(0) - new_T)[step_N]  # among the new ones of its step
        last_N = place_N >= new_T[step_N] - KEPT
        slot_N = (self.seen_T[step_N] + place_N) % KEPT
        self.losses_TK[step_N[last_N], slot_N[last_N]] = loss_N[last_N].double()
        self.seen_T += new_T

    def state(self) -> dict:
        """Everything that a checkpoint must keep, ready for JSON."""
        return {"losses": self.losses_TK.tolist(), "seen": self.seen_T.tolist()}

    def load(self, state: dict) -> None:
        """Goes on from what `state` returned."""
        self.losses_TK = torch.tensor(state["losses"], dtype=torch.float64)
        self.seen_T = torch.tensor(state["seen"])
