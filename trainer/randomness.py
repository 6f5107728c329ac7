"""The randomness of a training batch, keyed by (seed, step, sample, draw): the same whatever rank computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum

import torch

from model.batch import PackedBatch
from model.config import DiffusionConfig, ModelConfig
from model.diffusion.adaptive_time import AdaptiveTime
from model.diffusion.loss_second_moment import LossSecondMoment
from model.diffusion_lm import NoiseDraw
from model.keyed_random import keyed_generator


class Stream(IntEnum):
    """First part of every key, so that no two uses of a seed share a stream."""

    COPY = 1
    JITTER = 2
    EVALUATION = 3
    EMBEDDING = 4
    DROPOUT = 5
    TASK = 6


def learned_times(config: DiffusionConfig) -> AdaptiveTime | LossSecondMoment | None:
    """What learns from the losses which times to draw, where the configuration asks for it."""
    if config.time_sampling == "adaptive":
        return AdaptiveTime()
    return LossSecondMoment(config.steps) if config.time_sampling == "loss_second_moment" else None


def training_draw(batch: PackedBatch, config: ModelConfig, seed: int, step: int) -> NoiseDraw:
    """Time, noise, absorption and self-conditioning of every noised copy, on the CPU."""
    stratified = config.diffusion.time_sampling in ("stratified", "adaptive")
    stratum_C = batch.stratum_C.tolist()
    drawn, guesses = [], []

    def one_copy(index: int, generator: torch.Generator) -> None:
        time, coin = torch.rand(2, generator=generator).tolist()
        if stratified:
            time = (stratum_C[index] + time) / batch.strata
        drawn.append(time)
        guesses.append(coin < config.diffusion.self_conditioning)

    noise_NE, uniform_N = _token_noise(batch, config, (Stream.COPY, seed, step), one_copy)

    def keys(count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int64).random_(generator=generator)

    return NoiseDraw(
        time_C=torch.tensor(drawn), noise_NE=noise_NE, uniform_N=uniform_N,
        guess_C=torch.tensor(guesses) if config.diffusion.self_conditioning > 0 else None,
        jitter_T=_every_token(batch, (Stream.JITTER, seed, step), keys) if config.moe.jitter > 0 else None,
        embedding_noise_TE=_every_token(
            batch, (Stream.EMBEDDING, seed, step), lambda count, generator: torch.randn(
                count, config.embed_dim, generator=generator)) if config.diffusion.embedding_noise else None,
        dropout_T=_every_token(batch, (Stream.DROPOUT, seed, step), keys) if config.dropout > 0 else None)


def at_learned_times(draw: NoiseDraw, times: AdaptiveTime | LossSecondMoment) -> NoiseDraw:
    """The draw at the times, and with the weights, that `times` (of `learned_times`) makes of its even ones."""
    time_C = times.draw(draw.time_C)
    return replace(draw, time_C=time_C, weight_C=times.weights(time_C))


def evaluation_draw(batch: PackedBatch, config: ModelConfig, time_C: torch.Tensor, seed: int) -> NoiseDraw:
    """Noise of an evaluation at given times; the same for every model, step and rank. Embeddings are exact, as in
    generation."""
    noise_NE, uniform_N = _token_noise(batch, config, (Stream.EVALUATION, seed), lambda index, generator: None)
    guess_C = torch.ones_like(time_C, dtype=torch.bool) if config.diffusion.self_conditioning > 0 else None
    return NoiseDraw(time_C=time_C, noise_NE=noise_NE, uniform_N=uniform_N, guess_C=guess_C)


def _token_noise(batch: PackedBatch, config: ModelConfig, key: tuple[int, ...], per_copy) -> tuple:
    """Normal noise [N, E] and uniform numbers [N] of the target tokens; per_copy may draw first from each stream."""
    copy_N = batch.copy_T[batch.is_target_T]
    place_N = torch.argsort(copy_N, stable=True)
    counts = torch.bincount(copy_N, minlength=batch.sample_C.numel()).tolist()
    normals, uniforms = [], []
    for index, (sample, draw) in enumerate(zip(batch.sample_C.tolist(), batch.draw_C.tolist(), strict=True)):
        generator = keyed_generator(*key, sample, draw)
        per_copy(index, generator)
        normals.append(torch.randn(counts[index], config.embed_dim, generator=generator))
        uniforms.append(torch.rand(counts[index], generator=generator))
    noise_NE, uniform_N = torch.empty(copy_N.numel(), config.embed_dim), torch.empty(copy_N.numel())
    noise_NE[place_N], uniform_N[place_N] = torch.cat(normals), torch.cat(uniforms)
    return noise_NE, uniform_N


def _every_token(batch: PackedBatch, key: tuple[int, ...],
                 make: Callable[[int, torch.Generator], torch.Tensor]) -> torch.Tensor:
    """What `make` gives for every token of the batch, from one stream for each copy, its tokens in packed order."""
    place_T = torch.argsort(batch.copy_T, stable=True)
    counts = torch.bincount(batch.copy_T, minlength=batch.sample_C.numel()).tolist()
    made = torch.cat([make(count, keyed_generator(*key, sample, draw)) for count, sample, draw
                      in zip(counts, batch.sample_C.tolist(), batch.draw_C.tolist(), strict=True)])
    in_order = torch.empty_like(made)
    in_order[place_T] = made
    return in_order


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Where PyTorch's own generators of this process stand. Training draws nothing from them that matters; they are
    kept so that whatever does draw from them goes on after a resume as it would have."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Sets the generators to what `random_states` returned."""
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
