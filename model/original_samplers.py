"""Samplers as the original DiffuSeq (v1 and v2) has them, defects included: to repeat its numbers, not to be used.

`model/sampling.py` has the ones to use. All work on a state x [..., E] in the coordinates of the embedding table, and
are given: predict(x, step), the estimate of the clean embeddings, step counting from 0 and possibly between two steps;
impose(x), x with its source positions set back to their embeddings; noise(), standard normal numbers like x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.diffusion.discrete import DiscreteProcess
from model.diffusion.schedule import NoiseSchedule

Predict = Callable[[Tensor, float], Tensor]
Change = Callable[[Tensor], Tensor]


def ancestral(process: DiscreteProcess, predict: Predict, x: Tensor, impose: Change, noise: Callable[[], Tensor], *,
              rounded: Change = lambda clean: clean,
              absorbed: Callable[[Tensor, float], Tensor] = lambda x, variance: x) -> Tensor:
    """p_sample_loop: x from the posterior q(x_{t-1} | x_t, estimate), but with the variance beta_t ("fixed large").

    rounded: what becomes of each estimate, for instance `nearest_row`. absorbed(x, variance): DiffuSeq-v2's absorption
    after each step but the last, where a token is replaced by m with probability gamma * sqrt(variance); neither that
    nor the posterior, which knows of no m, is the reverse of its forward process.
    """
    for step in reversed(range(len(process))):
        clean = rounded(predict(x, process.kept[step]))
        x = process.mean_clean[step].item() * clean + process.mean_noisy[step].item() * x
        if step > 0:
            variance = process.sampling_variance[step].item()
            x = absorbed(x + variance ** 0.5 * noise(), variance)
        x = impose(x)
    return x


def ddim(process: DiscreteProcess, predict: Predict, x: Tensor, impose: Change, *, eta: float = 0.0,
         noise: Callable[[], Tensor] | None = None, gap: int = 1, rounded: Change = lambda clean: clean) -> Tensor:
    """ddim_sample_loop (Song et al. 2020, equation 12).

    gap: visit only every gap-th step, counted from the noisiest. Each update still goes to the next step of the
    process instead of the next one visited, so that for gap > 1 the state is noisier than the network is told: what
    the original's decoding script does with `--step`. A respaced process with gap = 1 is right.
    """
    for step in range(len(process) - 1, -1, -gap):
        signal, next_signal = process.alpha_bar[step].item(), process.alpha_bar_before[step].item()
        clean = rounded(predict(x, process.kept[step]))
        direction = (x / signal ** 0.5 - clean) / (1 / signal - 1) ** 0.5
        spread = eta * ((1 - next_signal) / (1 - signal) * (1 - signal / next_signal)) ** 0.5
        x = next_signal ** 0.5 * clean + (1 - next_signal - spread ** 2) ** 0.5 * direction
        if spread > 0:
            x = x + spread * noise()
        x = impose(x)
    return x


def diffuseq_v2_compat(schedule: NoiseSchedule, predict: Predict, x: Tensor, impose: Change, steps: int) -> Tensor:
    """DiffuSeq-v2's copy of DPM-Solver++ (2M), which differs from it in two ways: the state is overwritten by the
    estimate after every call of the network, so that the noise does not survive, and the network is told a time that
    is one step too late. It refines an estimate; it does not sample. Every text that it gives for one source is
    nearly the same: it fails the test that all samplers of `model/sampling.py` pass.
    """
    time = torch.linspace(1, 1 / schedule.steps, steps + 1, dtype=torch.float64)
    log_snr = schedule.log_snr_at(time * schedule.steps - 1)
    alpha, sigma = torch.sigmoid(log_snr).sqrt().tolist(), torch.sigmoid(-log_snr).sqrt().tolist()
    half_steps = log_snr.diff() / 2
    clean = before = x
    for index in range(steps):
        before, clean = clean, impose(predict(x, time[index].item() * schedule.steps))
        target = clean
        if index > 0 and not (steps < 10 and index == steps - 1):
            target = clean + (half_steps[index] / (2 * half_steps[index - 1])).item() * (clean - before)
        shrink, gain = sigma[index + 1] / sigma[index], -alpha[index + 1] * torch.expm1(-half_steps[index]).item()
        x = impose(shrink * clean + gain * target)
    return x


def nearest_row(x: Tensor, table_VE: Tensor) -> Tensor:
    """int64 [...]: the row of the table nearest to each vector of x, by squared distance."""
    flat = x.reshape(-1, x.shape[-1])
    distance = table_VE.square().sum(-1) + flat.square().sum(-1, keepdim=True) - 2 * flat @ table_VE.T
    return distance.clamp(min=0).argmin(-1).view(x.shape[:-1])
