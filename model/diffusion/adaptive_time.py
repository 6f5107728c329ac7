"""Time sampling that follows the loss: every slice of time holds an equal share of the rise of the cross-entropy.

CDCD (Dieleman et al. 2022, arXiv 2211.15089) samples noise levels so that the entropy of the prediction
grows linearly in the uniform number they come from. Here F, the warp's inverse, is the mean cross-entropy of a trained
token as a function of time, made monotone and scaled to [0, 1]; a time is F^-1(u). What counts is how the cross-entropy
rises from one slice of time to the next, so the result does not depend on the schedule's parametrisation of log-SNR.
The loss is not divided by the density: how often a noise level is drawn is its weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.batch import PackedBatch
    from model.diffusion_lm import BatchPlan, LossReport, NoiseDraw

SLICES = 32
_UNIFORM = 0.15  # share of the density that is spread evenly, so that no noise level is ever left unmeasured
_DECAY = 0.99  # of what was measured, per step: the estimate is a mean over about the last hundred steps


class AdaptiveTime:
    """The running mean cross-entropy by slice of time, and the warp that follows from it. Lives on the CPU; equal on
    all ranks as long as each is given the same sums."""

    def __init__(self) -> None:
        self.sums_2S = torch.zeros(2, SLICES, dtype=torch.float64)
        """Cross-entropy and number of trained tokens by slice, older steps counting less."""

    def draw(self, uniform_C: Tensor) -> Tensor:
        """Times [C] from evenly spread numbers in [0, 1]; those themselves until every slice has been measured."""
        if not bool((self.sums_2S[1] > 0).all()):
            return uniform_C
        edges = torch.cat((torch.zeros(1, dtype=torch.float64), self.density().cumsum(0)))
        edges = edges / edges[-1]
        u_C = uniform_C.double()
        slice_C = (torch.searchsorted(edges, u_C, right=True) - 1).clamp(0, SLICES - 1)
        inside_C = (u_C - edges[slice_C]) / (edges[slice_C + 1] - edges[slice_C])
        return ((slice_C + inside_C) / SLICES).clamp(0, 1).to(uniform_C.dtype)

    def weights(self, time_C: Tensor) -> None:
        """None: all losses count alike."""

    def density(self) -> Tensor:
        """Share [S] of all draws that falls into each slice."""
        mean_S = self.sums_2S[0] / self.sums_2S[1]
        # The mean of the smallest monotone curve above and the largest below: what noise adds upwards it loses again.
        rising_S = (mean_S.cummax(0).values + mean_S.flip(0).cummin(0).values.flip(0)) / 2
        rise_S = torch.gradient(rising_S)[0].clamp_min(0)
        total = rise_S.sum()
        even_S = torch.full_like(rise_S, 1 / SLICES)
        return torch.lerp(rise_S / total, even_S, _UNIFORM) if total > 0 else even_S

    def measure(self, batch: PackedBatch, plan: BatchPlan, draw: NoiseDraw, report: LossReport) -> Tensor:
        """float64 [2, S]: cross-entropy and number of a micro-batch's trained tokens by slice of time, on their device.
        To be added up over micro-batches and ranks."""
        time_M = draw.time_C[batch.copy_T[plan.target_N[plan.loss_of_target_M]]]
        return slice_sums(time_M, report.cross_entropy_M)

    def observe(self, sums_2S: Tensor) -> None:
        """Learns from what was measured in one step, all of the global batch."""
        self.sums_2S = _DECAY * self.sums_2S + sums_2S.cpu()

    def state(self) -> list:
        """Everything that a checkpoint must keep, ready for JSON."""
        return self.sums_2S.tolist()

    def load(self, state: list) -> None:
        """Goes on from what `state` returned."""
        self.sums_2S = torch.tensor(state, dtype=torch.float64)


def slice_sums(time_M: Tensor, cross_entropy_M: Tensor) -> Tensor:
    """Cross-entropy and number of the trained tokens by slice of time, float64 [2, S] on their device."""
    slice_M = (time_M * SLICES).long().clamp(0, SLICES - 1)
    sums_2S = torch.zeros(2, SLICES, dtype=torch.float64, device=time_M.device)
    values_2M = torch.stack((cross_entropy_M.double(), torch.ones_like(cross_entropy_M, dtype=torch.float64)))
    return sums_2S.index_add_(1, slice_M, values_2M)
