"""Noise schedules: continuous time t in [0, 1] (0 clean, 1 noisy) -> log signal-to-noise ratio.

The process preserves variance: z = alpha * x + sigma * noise with alpha^2 + sigma^2 = 1, so that one number,
log_snr = log(alpha^2 / sigma^2), says all of a noise level.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import ModelConfig

_CLEAN_OFFSET = 1e-4  # sqrt schedule: 1 - sqrt(t + offset), as in Diffusion-LM (Li et al. 2022)
_LIMIT = 12.0  # |log_snr| of cosine and sqrt is cut here: beyond, alpha or sigma underflow in fp32


class NoiseSchedule:
    """log_snr(t) of a model's configuration, and the way back for time grids."""

    def __init__(self, config: ModelConfig):
        self.name = config.diffusion.schedule
        self.low, self.high = config.log_snr_range() if self.name == "log_snr" else (-_LIMIT, _LIMIT)

    def log_snr(self, t: Tensor) -> Tensor:
        if self.name == "log_snr":
            return self.high + (self.low - self.high) * t
        if self.name == "sqrt":
            alpha_squared = (1 - torch.sqrt(t + _CLEAN_OFFSET)).clamp(1e-9, 1 - 1e-9)
        else:  # cosine (Nichol & Dhariwal 2021), without its offset: the cut at _LIMIT does the same
            alpha_squared = torch.cos(0.5 * math.pi * t).square().clamp(1e-9, 1 - 1e-9)
        return torch.logit(alpha_squared.double()).clamp(self.low, self.high).to(t.dtype)


def alpha_sigma(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of the variance-preserving process."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
