"""Sampling: from pure noise on the target canvas to tokens, in a few tens of network evaluations.

DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) with data prediction in the half log-SNR l = log_snr / 2. For a step
of size h = l_s - l_t from level t to the cleaner s, with the estimate D of the clean embedding:

    ODE:  z_s = sigma_s / sigma_t * z_t          + alpha_s * (1 - exp(-h))  * D
    SDE:  z_s = sigma_s / sigma_t * exp(-h) z_t  + alpha_s * (1 - exp(-2h)) * D + sigma_s * sqrt(1 - exp(-2h)) * noise

First order takes D = x(t), the present estimate; second order (2M) extrapolates from the one before,
D = x(t) + h / (2 h_before) * (x(t) - x(before)). The first-order SDE step is exactly the ancestral one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.batch import PackedBatch
from model.denoiser import StreamPlan
from model.diffusion.process import NoisyTargets, absorbed_at
from model.diffusion.schedule import alpha_sigma
from model.diffusion_lm import DiffusionLM
from model.errors import ConfigError
from model.keyed_random import keyed_generator
from model.original_samplers import diffuseq_v2_compat, nearest_row

SOLVERS = {"dpmpp1": (1, False), "dpmpp2m": (2, False), "ancestral": (1, True), "dpmpp2m_sde": (2, True)}
"""Name -> (order, stochastic)."""
COMPAT = "diffuseq_v2_compat"
"""The original's solver (`model/original_samplers.py`), to repeat what it gives; only for its network."""


@dataclass(frozen=True)
class SamplerSettings:
    """solver: a name of SOLVERS, or COMPAT, which knows no temperature and no clamp. steps: network evaluations.
    temperature: of the predicted distribution before its mean is taken; below 1 sharpens. clamp: replace the mean by
    the nearest token's embedding (rounding)."""

    solver: str = "dpmpp2m_sde"
    steps: int = 20
    temperature: float = 1.0
    clamp: bool = False
    seed: int = 0


class Drawn(NamedTuple):
    """tokens_CL: ids [C, L], L the canvas's length. estimate_NE: the last predicted embeddings of all canvases."""

    tokens_CL: Tensor
    estimate_NE: Tensor


class _CanvasNoise:
    """Noise of C canvases of L tokens; each canvas's stream is fixed by (seed, sample, draw) alone."""

    def __init__(self, batch: PackedBatch, settings: SamplerSettings, length: int, width: int,
                 device: torch.device | str):
        self.generators = [keyed_generator(settings.seed, sample, draw)
                           for sample, draw in zip(batch.sample_C.tolist(), batch.draw_C.tolist(), strict=True)]
        self.length, self.width, self.device = length, width, device

    def uniform(self) -> Tensor:
        return torch.cat([torch.rand(self.length, generator=g) for g in self.generators]).to(self.device)

    def normal(self) -> Tensor:
        draws = [torch.randn(self.length, self.width, generator=g) for g in self.generators]
        return torch.cat(draws).to(self.device)


class _Network:
    """One evaluation of the denoiser at a noise level, with sources computed once where conditioning allows it."""

    def __init__(self, model: DiffusionLM, batch: PackedBatch, device: torch.device | str):
        self.model, self.copies, self.device = model, batch.sample_C.numel(), device
        dtype = model.embedding.dtype
        self.cached = model.config.diffusion.conditioning == "cached"
        if not self.cached:
            self.batch, self.plan = batch.to(device), model.prepare(batch, device=device, dtype=dtype).to(device)
            return
        sources = batch.take((~batch.is_target_T).nonzero().flatten())
        everything = batch.take(torch.argsort(batch.is_target_T.int(), stable=True))
        self.plan = self._stream(everything, "target", dtype)
        self.cache = None  # texts without source
        if len(sources):
            self.cache = model.encode_sources(sources.to(device), self._stream(sources, "all", dtype))

    def _stream(self, part: PackedBatch, queries: str, dtype: torch.dtype) -> StreamPlan:
        plan = self.model.denoiser.prepare(
            part.tokens_T, part.document_T, part.position_T, part.is_target_T, part.draw_T, part.copy_T, self.copies,
            part.row_T, part.rows, device=self.device, dtype=dtype, queries=queries)
        return plan.to(self.device)

    def __call__(self, z_NE: Tensor, absorbed_N: Tensor, log_snr: Tensor, guess_NE: Tensor) -> tuple[Tensor, Tensor]:
        noisy = NoisyTargets(z_NE, absorbed_N, log_snr.expand(z_NE.shape[0]))
        log_snr_C = log_snr.expand(self.copies)
        if self.cached:
            return self.model.predict_targets(noisy, guess_NE, log_snr_C, self.plan, self.cache)
        return self.model.predict_packed(self.batch, self.plan, noisy, guess_NE, log_snr_C)


def noise_levels(model: DiffusionLM, settings: SamplerSettings) -> Tensor:
    """log-SNR of every network evaluation [steps], from the noisiest to the cleanest."""
    return model.schedule.log_snr(torch.linspace(1, 0, settings.steps, dtype=torch.float64)).float()


@torch.no_grad()
def sample(model: DiffusionLM, batch: PackedBatch, settings: SamplerSettings, *, device: torch.device | str = "cpu",
           trace: list[Tensor] | None = None, between: Callable[[], None] = lambda: None) -> Drawn:
    """Denoises every target canvas of a CPU batch. All canvases have the same length and stand in the batch in the
    order of their copies. trace: is given the most likely tokens, [C, L] on the CPU, of every step.
    between: called before every step; may raise to abandon the sampling."""
    if settings.solver == COMPAT:
        return _sample_compat(model, batch, settings, device)
    config = model.config
    length = int(batch.is_target_T.sum()) // batch.sample_C.numel()
    order, stochastic = SOLVERS[settings.solver]
    noise = _CanvasNoise(batch, settings, length, config.embed_dim, device)
    network = _Network(model, batch, device)
    levels = noise_levels(model, settings).to(device)
    alphas, sigmas = alpha_sigma(levels)
    half_steps = levels.diff() / 2

    uniform_N, choice_N, start_NE = noise.uniform(), noise.uniform(), noise.normal()
    absorbed_N = absorbed_at(uniform_N, levels[0], config.diffusion.absorbing)
    z_NE = (sigmas[0] * start_NE).masked_fill(absorbed_N[:, None], 0.0)
    estimate_NE = before_NE = torch.zeros_like(z_NE)
    for index in range(settings.steps):
        between()
        output, rows_VE = network(z_NE, absorbed_N, levels[index], estimate_NE)
        logits_NV = model.logits(output, rows_VE)
        probability_NV = (logits_NV / settings.temperature).softmax(-1)
        before_NE, estimate_NE = estimate_NE, _estimate(model, output, probability_NV, rows_VE, settings.clamp, length)
        if trace is not None:
            trace.append(logits_NV.argmax(-1).view(-1, length).cpu())
        if index == settings.steps - 1:
            break
        h = half_steps[index]
        target_NE = estimate_NE
        if order == 2 and index > 0:
            target_NE = estimate_NE + h / (2 * half_steps[index - 1]) * (estimate_NE - before_NE)
        alpha, sigma, shrink = alphas[index + 1], sigmas[index + 1], sigmas[index + 1] / sigmas[index]
        fresh_NE = noise.normal() if stochastic else start_NE
        if stochastic:
            z_NE = (shrink * torch.exp(-h) * z_NE - alpha * torch.expm1(-2 * h) * target_NE
                    + sigma * (-torch.expm1(-2 * h)).sqrt() * fresh_NE)
        else:
            z_NE = shrink * z_NE - alpha * torch.expm1(-h) * target_NE
        still_N = absorbed_at(uniform_N, levels[index + 1], config.diffusion.absorbing)
        # A token that leaves the absorbing state is drawn, then noised: the mean of several would be none of them.
        drawn_N = torch.searchsorted(probability_NV.cumsum(-1), choice_N[:, None]).squeeze(-1)
        drawn_NE = rows_VE[drawn_N.clamp(max=config.vocab_size - 1)]
        released_N1 = (absorbed_N & ~still_N)[:, None]
        z_NE = torch.where(released_N1, alpha * drawn_NE + sigma * fresh_NE, z_NE)
        z_NE, absorbed_N = z_NE.masked_fill(still_N[:, None], 0.0), still_N
    tokens_CL = logits_NV.argmax(-1).view(-1, length)
    return Drawn(tokens_CL.cpu(), estimate_NE.cpu())


def _estimate(model: DiffusionLM, output: Tensor, probability_NV: Tensor, rows_VE: Tensor, clamp: bool,
              length: int) -> Tensor:
    """Expected clean canvas. Behind the end of a text stands filler, which the model is not trained to predict: the
    chance that token i lies there is that of an end token before i, 1 - prod_{j<i} (1 - p_j(end))."""
    if clamp:
        mean_NE = rows_VE[probability_NV.argmax(-1) if model.predicts_tokens else nearest_row(output, rows_VE)]
    else:
        mean_NE = probability_NV @ rows_VE if model.predicts_tokens else output
    if model.config.diffusion.loss_over != "text":
        return mean_NE
    going_on_CL = 1 - probability_NV[:, model.config.eos_id].view(-1, length)
    alive_CL = torch.cat((torch.ones_like(going_on_CL[:, :1]), going_on_CL.cumprod(1)[:, :-1]), dim=1)
    filler_E = rows_VE[model.config.pad_id]
    return torch.lerp(filler_E.expand_as(mean_NE), mean_NE, alive_CL.reshape(-1, 1))


def _sample_compat(model: DiffusionLM, batch: PackedBatch, settings: SamplerSettings,
                   device: torch.device | str) -> Drawn:
    """`sample` by COMPAT: starts from plain noise without the absorbing vector, and decodes the state it ends in."""
    config = model.config
    if config.network != "bert":
        raise ConfigError("sample.solver", f"{COMPAT} repeats what the original does with its own network, but "
                          f"model.network is {config.network}: choose one of {', '.join(SOLVERS)}")
    length = int(batch.is_target_T.sum()) // batch.sample_C.numel()
    network, rows_VE = _Network(model, batch, device), model.rows()
    start_NE = _CanvasNoise(batch, settings, length, config.embed_dim, device).normal()
    origin_E = model.unshifted(torch.zeros(config.embed_dim, device=start_NE.device))
    zeros_NE = torch.zeros_like(start_NE)
    absorbed_N = torch.zeros_like(start_NE[:, 0], dtype=torch.bool)

    def predict(x_NE: Tensor, step: float) -> Tensor:
        level = model.schedule.log_snr_at(torch.tensor(step, device=x_NE.device)).float()
        return network(x_NE - origin_E, absorbed_N, level, zeros_NE)[0] + origin_E

    # Sources are not part of the state here: the network is given their embeddings anew at every call.
    end_NE = diffuseq_v2_compat(model.schedule, predict, start_NE, lambda x_NE: x_NE, settings.steps) - origin_E
    return Drawn(model.logits(end_NE, rows_VE).argmax(-1).view(-1, length).cpu(), end_NE.cpu())
