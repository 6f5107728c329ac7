"""Sampling: from pure noise on the target canvas to tokens, in a few tens of network evaluations.

DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) with data prediction in the half log-SNR l = log_snr / 2. For a step
of size h = l_s - l_t from level t to the cleaner s, with the estimate D of the clean embedding:

    ODE:  z_s = sigma_s / sigma_t * z_t          + alpha_s * (1 - exp(-h))  * D
    SDE:  z_s = sigma_s / sigma_t * exp(-h) z_t  + alpha_s * (1 - exp(-2h)) * D + sigma_s * sqrt(1 - exp(-2h)) * noise

First order takes D = x(t), the present estimate; second order (2M) extrapolates from the one before,
D = x(t) + h / (2 h_before) * (x(t) - x(before)), unless h_before = 0. The first-order ODE step is that of DDIM (Song et
al. 2020, arXiv 2010.02502) between the levels that are visited, the first-order SDE step exactly the ancestral one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.batch import PackedBatch
from model.config import ModelConfig
from model.denoiser import StreamPlan
from model.diffusion.process import NoisyTargets, absorbed_at
from model.diffusion.schedule import alpha_sigma
from model.diffusion_lm import DiffusionLM
from model.errors import ConfigError
from model.keyed_random import keyed_generator
from model.original_samplers import diffuseq_v2_compat, nearest_row

SOLVERS = {"ddim": (1, False), "dpmpp1": (1, False), "dpmpp2m": (2, False), "ancestral": (1, True),
           "dpmpp2m_sde": (2, True)}
"""Name -> (order, stochastic). ddim and dpmpp1 are two names of one solver."""
COMPAT = "diffuseq_v2_compat"
"""The original's solver (`model/original_samplers.py`), to repeat what it gives; only for its network."""
GRIDS = ("time", "log_snr")


@dataclass(frozen=True)
class SamplerSettings:
    """solver: a name of SOLVERS, or COMPAT, which knows of steps and seed only. steps: noise levels that are visited,
    one network evaluation each (two with guidance). grid: levels evenly spaced in the schedule's `time` or in
    `log_snr`. temperature: of the predicted distribution before its mean is taken; below 1 sharpens;
    1 for a model that predicts embeddings (loss = mse), whose mean is its prediction itself. end_temperature: of the
    chance that a text ends at a token, for a model that is not trained on filler (loss_over = text): sharpened as much
    as the words, the end token, which is among the likelier ones wherever little is known, ends texts early.
    guidance: w of classifier-free guidance, free + w * (conditional - free) on the prediction (Ho & Salimans 2022,
    arXiv 2207.12598); 1 is none. clamp: replace the mean by the nearest token's embedding (rounding)."""

    solver: str = "dpmpp2m_sde"
    steps: int = 20
    grid: str = "time"
    temperature: float = 1.0
    end_temperature: float = 1.0
    guidance: float = 1.0
    clamp: bool = False
    seed: int = 0

    def check(self, config: ModelConfig) -> None:
        """Refuses, with ConfigError, what no solver or not this model can do."""
        choices = {"solver": (*SOLVERS, COMPAT), "grid": GRIDS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"sample.{name}", f"is '{getattr(self, name)}', must be one of {', '.join(allowed)}")
        if self.guidance != 1 and config.diffusion.source_dropout == 0:
            raise ConfigError("sample.guidance", f"is {self.guidance}, but the model is trained with "
                              "model.diffusion.source_dropout = 0 and never sees an empty source: set it to 1, or "
                              "train with a source_dropout of about 0.1")
        if self.temperature != 1 and config.diffusion.loss == "mse":
            raise ConfigError("sample.temperature", f"is {self.temperature}, which sharpens predicted tokens, but "
                              "with model.diffusion.loss = mse the model predicts embeddings: set it to 1")
        if self.end_temperature != 1 and config.diffusion.loss_over != "text":
            raise ConfigError("sample.end_temperature", f"is {self.end_temperature}, but with "
                              f"model.diffusion.loss_over = {config.diffusion.loss_over} the model predicts what "
                              "follows a text's end like everything else: set it to 1")
        if self.solver != COMPAT:
            return
        if config.network != "bert":
            raise ConfigError("sample.solver", f"{COMPAT} repeats what the original does with its own network: set "
                              f"model.network to bert, or choose one of {', '.join(SOLVERS)}")
        for name in ("grid", "temperature", "end_temperature", "guidance", "clamp"):
            default = getattr(SamplerSettings, name)
            if getattr(self, name) != default:
                raise ConfigError(f"sample.{name}", f"is {str(getattr(self, name)).lower()}, which {COMPAT} knows "
                                  f"nothing of: set it to {str(default).lower()}, or choose another sample.solver")


class Drawn(NamedTuple):
    """tokens_CL: ids [C, L] of the noised tokens of each canvas, L the most that one has; <pad> behind shorter ones.
    estimate_NE: the last predicted embeddings of all canvases."""

    tokens_CL: Tensor
    estimate_NE: Tensor


def noise_levels(model: DiffusionLM, settings: SamplerSettings) -> Tensor:
    """log-SNR of every network evaluation [steps], from the noisiest to the cleanest."""
    time = torch.linspace(1, 0, settings.steps, dtype=torch.float64)
    levels = model.schedule.log_snr(time)
    if settings.grid == "log_snr":
        levels = torch.lerp(levels[0], levels[-1], 1 - time)
    return levels.float()


@torch.no_grad()
def sample(model: DiffusionLM, batch: PackedBatch, settings: SamplerSettings, *, device: torch.device | str = "cpu",
           trace: list[Tensor] | None = None, between: Callable[[], None] = lambda: None) -> Drawn:
    """Denoises the target tokens of a CPU batch, whose canvases stand in the order of their copies and may differ in
    length. What a canvas becomes is fixed by (seed, sample, draw), not by the batch that it is in.

    trace: is given the most likely tokens, [C, L] on the CPU, of every step; not by COMPAT, which refuses it.
    between: called before every step; may raise to abandon the sampling. ConfigError as from `settings.check`.
    """
    settings.check(model.config)
    if settings.solver == COMPAT:
        if trace is not None:
            raise ConfigError("sample.solver", f"{COMPAT} keeps no trace of its steps: choose one of "
                              f"{', '.join(SOLVERS)}")
        return _sample_compat(model, batch, settings, device, between)
    config = model.config
    canvases = _Canvases(batch, settings.seed, config, device)
    network = _Network(model, batch, device)
    free_network = _Network(model, batch.without_sources(), device) if settings.guidance != 1 else None
    levels = noise_levels(model, settings).to(device)
    solver = _Solver(settings.solver, levels)

    uniform_N, choice_N, start_NE = canvases.uniform(), canvases.uniform(), canvases.normal()
    absorbed_N = absorbed_at(uniform_N, levels[0], config.diffusion.absorbing)
    z_NE = (solver.sigmas[0] * start_NE).masked_fill(absorbed_N[:, None], 0.0)
    estimate_NE = torch.zeros_like(z_NE)
    for index in range(settings.steps):
        between()
        output, rows_VE = network(z_NE, absorbed_N, levels[index], estimate_NE)
        if free_network is not None:
            output = torch.lerp(free_network(z_NE, absorbed_N, levels[index], estimate_NE)[0], output,
                                settings.guidance)
        logits_NV = canvases.without_early_end(model.logits(output, rows_VE))
        probability_NV = _probability(logits_NV, settings, config)
        if settings.clamp:
            nearest_N = probability_NV.argmax(-1) if model.predicts_tokens else nearest_row(output, rows_VE)
            estimate_NE = rows_VE[nearest_N]
        else:
            estimate_NE = probability_NV @ rows_VE if model.predicts_tokens else output
        if config.diffusion.loss_over == "text":
            estimate_NE = canvases.with_filler(estimate_NE, probability_NV, rows_VE)
        if trace is not None:
            trace.append(canvases.rows_of(logits_NV.argmax(-1)).cpu())
        if index == settings.steps - 1:
            break
        fresh_NE = canvases.normal() if solver.stochastic else start_NE
        z_NE = solver.step(index, z_NE, estimate_NE, fresh_NE)
        still_N = absorbed_at(uniform_N, levels[index + 1], config.diffusion.absorbing)
        # A token that leaves the absorbing state is drawn, then noised: the mean of several would be none of them.
        drawn_NE = rows_VE[_drawn(probability_NV, choice_N)]
        released_NE = solver.alphas[index + 1] * drawn_NE + solver.sigmas[index + 1] * fresh_NE
        z_NE = torch.where((absorbed_N & ~still_N)[:, None], released_NE, z_NE)
        z_NE, absorbed_N = z_NE.masked_fill(still_N[:, None], 0.0), still_N
    return Drawn(canvases.rows_of(logits_NV.argmax(-1)).cpu(), estimate_NE.cpu())


def token_logits(model: DiffusionLM, batch: PackedBatch, z_NE: Tensor, absorbed_N: Tensor, log_snr: Tensor,
                 guess_NE: Tensor) -> Tensor:
    """Token logits [N, V] of one evaluation of the network at one noise level, for the N target tokens of a CPU batch.

    z_NE, absorbed_N: the noisy targets in the shifted coordinates, and which of them are absorbed. guess_NE: the
    estimate of the step before, zeros for none.
    """
    output, rows_VE = _Network(model, batch, z_NE.device)(z_NE, absorbed_N, log_snr, guess_NE)
    return model.logits(output, rows_VE)


def _probability(logits_NV: Tensor, settings: SamplerSettings, config: ModelConfig) -> Tensor:
    """Tokens' probabilities [N, V] at the settings' temperatures: the end's at its own, the others' in what is left."""
    sharpened_NV = logits_NV / settings.temperature
    if config.diffusion.loss_over != "text" or settings.end_temperature == settings.temperature:
        return sharpened_NV.softmax(-1)
    is_end_V = torch.arange(config.vocab_size, device=logits_NV.device) == config.eos_id
    end_N1 = (logits_NV / settings.end_temperature).softmax(-1)[:, is_end_V]
    words_NV = sharpened_NV.masked_fill(is_end_V, -torch.inf).softmax(-1)
    return torch.where(is_end_V, end_N1, (1 - end_N1) * words_NV)


def _drawn(probability_NV: Tensor, choice_N: Tensor) -> Tensor:
    """A token [N] for every row of probabilities, by numbers in [0, 1) that are evenly spread. Probabilities are
    counted in whole parts of 2^31: their sums are the same in any order, which sums of fractions on a GPU are not."""
    until_NV = (probability_NV * 2**31).long().cumsum(-1)
    chosen_N1 = (choice_N.double() * until_NV[:, -1]).long()[:, None]
    return torch.searchsorted(until_NV, chosen_N1, right=True).squeeze(-1)


class _Solver:
    """The formulas at the head of this file, between the levels [S] that are visited."""

    def __init__(self, name: str, levels: Tensor):
        self.order, self.stochastic = SOLVERS[name]
        self.alphas, self.sigmas = alpha_sigma(levels)
        self.half_steps = levels.diff() / 2
        ratios = self.half_steps[1:] / (2 * self.half_steps[:-1])
        # Schedules that are cut or discrete may give one level twice: the step after such a pair is of first order.
        self.ratios = ratios.masked_fill(self.half_steps[:-1] == 0, 0.0)
        self._before_NE: Tensor | None = None

    def step(self, index: int, z_NE: Tensor, estimate_NE: Tensor, fresh_NE: Tensor) -> Tensor:
        """z at level index + 1 from z and the estimate at level index. fresh_NE: standard normal, for the SDEs."""
        h = self.half_steps[index]
        alpha, sigma = self.alphas[index + 1], self.sigmas[index + 1]
        shrink = sigma / self.sigmas[index]
        target_NE = estimate_NE
        if self.order == 2 and self._before_NE is not None:
            target_NE = estimate_NE + self.ratios[index - 1] * (estimate_NE - self._before_NE)
        self._before_NE = estimate_NE
        if self.stochastic:
            return (shrink * torch.exp(-h) * z_NE - alpha * torch.expm1(-2 * h) * target_NE
                    + sigma * (-torch.expm1(-2 * h)).sqrt() * fresh_NE)
        return shrink * z_NE - alpha * torch.expm1(-h) * target_NE


class _Canvases:
    """Where the N noised tokens lie on C canvases of up to L of them, the noise of each canvas, and its text's end."""

    def __init__(self, batch: PackedBatch, seed: int, config: ModelConfig, device: torch.device | str):
        copy_N = batch.copy_T[batch.is_target_T]
        length_C = torch.bincount(copy_N, minlength=batch.sample_C.numel())
        first_C = length_C.cumsum(0) - length_C
        self.lengths, self.config, self.device = length_C.tolist(), config, device
        self.shape = len(self.lengths), max(self.lengths)
        self.cell_N = (copy_N * self.shape[1] + torch.arange(len(copy_N)) - first_C[copy_N]).to(device)
        # A text does not end before a token of it that is given.
        last_given_C = torch.full_like(length_C, -1).scatter_reduce_(
            0, batch.copy_T[batch.is_given_T], batch.position_T[batch.is_given_T], "amax")
        goes_on_N = batch.position_T[batch.is_target_T] < last_given_C[copy_N]
        self.goes_on_N = goes_on_N.to(device) if batch.is_given_T.any() else None
        self.generators = [keyed_generator(seed, sample, draw)
                           for sample, draw in zip(batch.sample_C.tolist(), batch.draw_C.tolist(), strict=True)]

    def uniform(self) -> Tensor:
        """The next numbers in [0, 1) of every canvas's own stream [N]."""
        draws = [torch.rand(n, generator=g) for n, g in zip(self.lengths, self.generators, strict=True)]
        return torch.cat(draws).to(self.device)

    def normal(self) -> Tensor:
        """The next standard normal numbers of every canvas's own stream [N, E]."""
        draws = [torch.randn(n, self.config.embed_dim, generator=g)
                 for n, g in zip(self.lengths, self.generators, strict=True)]
        return torch.cat(draws).to(self.device)

    def rows_of(self, tokens_N: Tensor) -> Tensor:
        """Tokens by canvas [C, L], with <pad> where a canvas has fewer."""
        filled = tokens_N.new_full((self.shape[0] * self.shape[1],), self.config.pad_id)
        return filled.index_copy(0, self.cell_N, tokens_N).view(self.shape)

    def without_early_end(self, logits_NV: Tensor) -> Tensor:
        """Rules out the end token where a given token of the same text follows."""
        if self.goes_on_N is None:
            return logits_NV
        is_end_V = torch.arange(self.config.vocab_size, device=logits_NV.device) == self.config.eos_id
        return logits_NV.masked_fill(self.goes_on_N[:, None] & is_end_V, -torch.inf)

    def with_filler(self, estimate_NE: Tensor, probability_NV: Tensor, rows_VE: Tensor) -> Tensor:
        """Behind the end of a text stands filler, which the model is not trained to predict: the chance that token i
        lies there is that of an end token before i, 1 - prod_{j<i} (1 - p_j(end))."""
        going_on_CL = probability_NV.new_ones(self.shape[0] * self.shape[1]).index_copy(
            0, self.cell_N, 1 - probability_NV[:, self.config.eos_id]).view(self.shape)
        alive_CL = torch.cat((torch.ones_like(going_on_CL[:, :1]), going_on_CL.cumprod(1)[:, :-1]), dim=1)
        filler_E = rows_VE[self.config.pad_id]
        return torch.lerp(filler_E.expand_as(estimate_NE), estimate_NE, alive_CL.flatten()[self.cell_N, None])


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


def _sample_compat(model: DiffusionLM, batch: PackedBatch, settings: SamplerSettings,
                   device: torch.device | str, between: Callable[[], None]) -> Drawn:
    """`sample` by COMPAT: starts from plain noise without the absorbing vector, and decodes the state it ends in."""
    config = model.config
    canvases = _Canvases(batch, settings.seed, config, device)
    network, rows_VE = _Network(model, batch, device), model.rows()
    start_NE = canvases.normal()
    origin_E = model.unshifted(torch.zeros(config.embed_dim, device=start_NE.device))
    zeros_NE = torch.zeros_like(start_NE)
    absorbed_N = torch.zeros_like(start_NE[:, 0], dtype=torch.bool)

    def predict(x_NE: Tensor, step: float) -> Tensor:
        between()
        level = model.schedule.log_snr_at(torch.tensor(step, device=x_NE.device)).float()
        return network(x_NE - origin_E, absorbed_N, level, zeros_NE)[0] + origin_E

    # Sources are not part of the state here: the network is given their embeddings anew at every call.
    end_NE = diffuseq_v2_compat(model.schedule, predict, start_NE, lambda x_NE: x_NE, settings.steps) - origin_E
    return Drawn(canvases.rows_of(model.logits(end_NE, rows_VE).argmax(-1)).cpu(), end_NE.cpu())
