"""Noise schedules: time t in [0, 1] (0 clean, 1 noisy) -> log signal-to-noise ratio.

The process preserves variance: z = alpha * x + sigma * noise with alpha^2 + sigma^2 = 1, so that one number,
log_snr = log(alpha^2 / sigma^2), says all of a noise level.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import ModelConfig
from model.diffusion.discrete import DiscreteProcess, betas

_CLEAN_OFFSET = 1e-4  # sqrt schedule: 1 - sqrt(t + offset), as in Diffusion-LM (Li et al. 2022)
_LIMIT = 12.0  # |log_snr| of cosine and sqrt is cut here: beyond, alpha or sigma underflow in fp32


class NoiseSchedule:
    """log_snr(t) of a model's configuration; low and high are the levels at t = 1 and t = 0.

    With T = `steps` > 0 time is discrete: t belongs to step floor(t T), and there are T levels. What is between two
    steps is found by interpolating log alpha in the step, as DPM-Solver does for such models.
    """

    def __init__(self, config: ModelConfig):
        self.name, self.steps = config.diffusion.schedule, config.diffusion.steps
        if self.steps:
            alpha_bar_I = DiscreteProcess(betas(self.name, self.steps)).alpha_bar
            self._tables = {torch.device("cpu"): 0.5 * alpha_bar_I.log()}  # log alpha of every step, on each device
            self.low, self.high = (torch.logit(alpha_bar_I[end]).item() for end in (-1, 0))
        else:
            self.low, self.high = config.log_snr_range() if self.name == "log_snr" else (-_LIMIT, _LIMIT)

    def log_snr(self, t: Tensor) -> Tensor:
        if self.steps:
            return self.log_snr_at(self.step(t)).to(t.dtype)
        if self.name == "log_snr":
            return self.high + (self.low - self.high) * t
        if self.name == "sqrt":
            alpha_squared = (1 - torch.sqrt(t + _CLEAN_OFFSET)).clamp(1e-9, 1 - 1e-9)
        else:  # cosine (Nichol & Dhariwal 2021), without its offset: the cut at _LIMIT does the same
            alpha_squared = torch.cos(0.5 * math.pi * t).square().clamp(1e-9, 1 - 1e-9)
        return torch.logit(alpha_squared.double()).clamp(self.low, self.high).to(t.dtype)

    def step(self, t: Tensor) -> Tensor:
        """The step, int64 from 0 to T - 1, that a time in [0, 1] belongs to. Only with discrete time."""
        return (t * self.steps).long().clamp(max=self.steps - 1)

    def log_snr_at(self, step: Tensor) -> Tensor:
        """float64 log-SNR at a step, or between two, or beyond the last ones. Only with discrete time."""
        table_I = self._table(step.device)
        below = step.floor().long().clamp(0, self.steps - 2)
        log_alpha = torch.lerp(table_I[below], table_I[below + 1], step.double() - below)
        return 2 * log_alpha - torch.log(-torch.expm1(2 * log_alpha))

    def step_at(self, log_snr: Tensor) -> Tensor:
        """float64 step of a log-SNR, the inverse of `log_snr_at`. Only with discrete time."""
        table_I = self._table(log_snr.device)
        log_alpha = 0.5 * torch.nn.functional.logsigmoid(log_snr.double())
        below = (torch.searchsorted(-table_I, -log_alpha, right=True) - 1).clamp(0, self.steps - 2)
        return below + (log_alpha - table_I[below]) / (table_I[below + 1] - table_I[below])

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]


def alpha_sigma(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of the variance-preserving process."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
