"""Partial noising with a soft absorbing state, and what a noisy embedding says without any context.

All of it works in shifted coordinates y = x - m, where m is the absorbing vector: there the Gaussian part is the
standard variance-preserving process and an absorbed token is exactly 0. Only target tokens are ever noised.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.diffusion.schedule import alpha_sigma


@dataclass(frozen=True)
class NoisyTargets:
    """Target tokens at their noise level: z_TE in shifted coordinates, absorbed_T where z is the absorbing state,
    log_snr_T the level of each token."""

    z_TE: Tensor
    absorbed_T: Tensor
    log_snr_T: Tensor


def absorbed_at(uniform_T: Tensor, log_snr_T: Tensor, absorbing: float) -> Tensor:
    """True where a token is absorbed: probability absorbing * sigma.

    One uniform number per token decides for all levels. As sigma grows with the noise, a token absorbed at one level
    is absorbed at every noisier one, and the chance of leaving between two levels is 1 - sigma_s / sigma_t: the same
    function gives the forward process and its matched reverse.
    """
    return uniform_T < absorbing * alpha_sigma(log_snr_T)[1]


def add_noise(y_TE: Tensor, log_snr_T: Tensor, noise_TE: Tensor, uniform_T: Tensor, absorbing: float) -> NoisyTargets:
    """Forward process q(z_t | y): alpha * y + sigma * noise, then absorption. absorbing = 0 is plain Gaussian."""
    alpha_T, sigma_T = alpha_sigma(log_snr_T)
    z_TE = alpha_T[:, None] * y_TE + sigma_T[:, None] * noise_TE
    absorbed_T = absorbed_at(uniform_T, log_snr_T, absorbing)
    return NoisyTargets(z_TE.masked_fill(absorbed_T[:, None], 0.0), absorbed_T, log_snr_T)


def context_free_logits(noisy: NoisyTargets, rows_VE: Tensor, log_prior_V: Tensor) -> Tensor:
    """Unnormalised log p(token | its own noisy embedding) [T, V], by Bayes' rule from the unigram prior.

    log N(z; alpha e, sigma^2) up to terms without e is (alpha z.e - alpha^2 |e|^2 / 2) / sigma^2. It is all that can
    be known of a token without its context; an absorbed token leaves the prior.
    """
    alpha_T, sigma_T = alpha_sigma(noisy.log_snr_T)
    scale_T = (alpha_T / sigma_T.square()).masked_fill(noisy.absorbed_T, 0.0)
    half_norm_V = 0.5 * rows_VE.square().sum(-1)
    fit_TV = (scale_T[:, None] * noisy.z_TE) @ rows_VE.T - (scale_T * alpha_T)[:, None] * half_norm_V
    return fit_TV + log_prior_V
