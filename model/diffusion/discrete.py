"""Diffusion in T discrete steps as DDPM (Ho et al. 2020) and the original DiffuSeq count it, in float64.

Step i = 0..T-1 has the variance beta_i and keeps the share alpha_bar_i = prod_{j <= i} (1 - beta_j) of the signal's
variance. The schedules are those of Diffusion-LM (Li et al. 2022) and improved-diffusion (Nichol & Dhariwal 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_BETA_LIMIT = 0.999

_SIGNAL: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrt": lambda u: 1 - torch.sqrt(u + 1e-4),
    "cosine": lambda u: torch.cos((u + 0.008) / 1.008 * math.pi / 2).square(),
}
"""Schedule -> share of signal at the time u in [0, 1]; beta_i is the loss of it between i / T and (i + 1) / T."""


def betas(schedule: str, steps: int) -> Tensor:
    """float64 [T] on the CPU, at most 0.999: schedule is sqrt, cosine or linear."""
    if schedule == "linear":  # from 1e-4 to 0.02 at T = 1000, scaled to the same noise at any T
        beta_I = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64, device="cpu")
        return beta_I.clamp(max=_BETA_LIMIT)
    signal_I = _SIGNAL[schedule](torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps)
    return (1 - signal_I[1:] / signal_I[:-1]).clamp(max=_BETA_LIMIT)


class DiscreteProcess:
    """The coefficients of T steps, each float64 [T]; `kept` are the steps of a longer process that these are.

    mean_clean and mean_noisy: the mean of q(x_{t-1} | x_t, x_0) is mean_clean x_0 + mean_noisy x_t.
    variance: of the same, 0 at the first step. sampling_variance: what the original samples with ("fixed large"):
    beta, but the variance of the second step at the first.
    """

    def __init__(self, beta_I: Tensor, kept: list[int] | None = None):
        self.betas, self.kept = beta_I, list(range(len(beta_I))) if kept is None else kept
        self.alpha_bar = torch.cumprod(1 - beta_I, 0)
        before = torch.cat((beta_I.new_ones(1), self.alpha_bar[:-1]))
        self.alpha_bar_before = before
        self.mean_clean = beta_I * before.sqrt() / (1 - self.alpha_bar)
        self.mean_noisy = (1 - before) * (1 - beta_I).sqrt() / (1 - self.alpha_bar)
        self.variance = beta_I * (1 - before) / (1 - self.alpha_bar)
        self.sampling_variance = torch.cat((self.variance[1:2], beta_I[1:]))

    def __len__(self) -> int:
        return len(self.betas)

    def respaced(self, kept: list[int]) -> DiscreteProcess:
        """The process that visits only the steps listed, ascending, at the same noise levels."""
        signal = self.alpha_bar[kept]
        before = torch.cat((signal.new_ones(1), signal[:-1]))
        return DiscreteProcess(1 - signal / before, [self.kept[step] for step in kept])


def space_timesteps(steps: int, sections: list[int] | str) -> list[int]:
    """The steps to keep of `steps`, ascending (improved-diffusion's rule).

    sections: how many to keep of each of as many equal sections (the first ones are longer where they cannot be
    equal), evenly spaced from a section's first step to its last; or "ddimN": every k-th step from 0, k the smallest
    stride that gives exactly N. ValueError where there are not as many steps.
    """
    if isinstance(sections, str):
        wanted = int(sections.removeprefix("ddim"))
        stride = next((k for k in range(1, steps) if len(range(0, steps, k)) == wanted), None)
        if stride is None:
            raise ValueError(f"no stride keeps exactly {wanted} of {steps} steps")
        return list(range(0, steps, stride))
    kept: list[int] = []
    start = 0
    for number, count in enumerate(sections):
        size = steps // len(sections) + (number < steps % len(sections))
        if count > size:
            raise ValueError(f"cannot keep {count} of a section of {size} steps")
        stride, place = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            kept.append(start + round(place))
            place += stride  # a running sum, as in the original: its rounding decides some of the steps
        start += size
    return kept
