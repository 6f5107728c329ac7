"""Schedules, partial noising, context-free posterior, and samplers against an ideal denoiser."""

import math
from dataclasses import replace

import pytest
import torch

from model.config import DiffusionConfig, ModelConfig
from model.diffusion.process import NoisyTargets, absorbed_at, add_noise, context_free_logits
from model.diffusion.schedule import NoiseSchedule, alpha_sigma
from model.diffusion_lm import DiffusionLM
from model.packing import generation_batch
from model.sampling import SOLVERS, SamplerSettings, sample
from tests.model.small import small_config


@pytest.mark.parametrize("name", ["log_snr", "sqrt", "cosine"])
def test_schedules_fall_from_clean_to_noisy(name):
    schedule = NoiseSchedule(small_config(schedule=name))
    log_snr = schedule.log_snr(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert (log_snr.diff() <= 0).all() and log_snr[0] > log_snr[-1] + 4
    alpha, sigma = alpha_sigma(log_snr)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    torch.testing.assert_close(torch.log(alpha**2 / sigma**2), log_snr)


def test_schedules_follow_their_formulas():
    t = torch.tensor([0.1, 0.37, 0.5, 0.9], dtype=torch.float64)
    for name, alpha_squared in (("sqrt", 1 - torch.sqrt(t + 1e-4)), ("cosine", torch.cos(math.pi / 2 * t) ** 2)):
        alpha, _ = alpha_sigma(NoiseSchedule(small_config(schedule=name)).log_snr(t))
        torch.testing.assert_close(alpha**2, alpha_squared)
    config = small_config(schedule="log_snr", log_snr_range=[-6.0, 2.0])
    torch.testing.assert_close(NoiseSchedule(config).log_snr(t), 2 - 8 * t)


def test_automatic_range_is_the_documented_rule():
    low, high = small_config().log_snr_range()
    centre = math.log(2 * math.log(40) / 16) - 1.3
    assert (low, high) == pytest.approx((centre - 2.5, centre + 2.5))


def test_without_absorbing_the_process_is_plain_gaussian_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    y, noise = torch.randn(2, 500, 16, generator=generator)
    level, uniform = torch.randn(500, generator=generator) * 3, torch.rand(500, generator=generator)
    noisy = add_noise(y, level, noise, uniform, absorbing=0.0)
    alpha, sigma = alpha_sigma(level)
    assert torch.equal(noisy.z_TE, alpha[:, None] * y + sigma[:, None] * noise)
    assert not noisy.absorbed_T.any()


def test_absorption_has_the_stated_rate_and_only_grows_with_noise():
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    before = torch.zeros_like(uniform, dtype=torch.bool)
    for log_snr in (3.0, 0.0, -2.0, -6.0):
        now = absorbed_at(uniform, torch.tensor(log_snr), absorbing=0.7)
        expected = 0.7 * math.sqrt(1 / (1 + math.exp(log_snr)))
        assert now.float().mean().item() == pytest.approx(expected, abs=4e-3)
        assert (now | ~before).all()
        before = now


def test_absorbed_tokens_are_zero_in_shifted_coordinates():
    noisy = add_noise(torch.ones(100, 8), torch.zeros(100), torch.ones(100, 8), torch.linspace(0, 0.999, 100), 0.5)
    assert noisy.absorbed_T.sum() == 36  # 0.5 * sigma(0) = 0.354
    assert (noisy.z_TE[noisy.absorbed_T] == 0).all() and (noisy.z_TE[~noisy.absorbed_T] != 0).all()


def test_context_free_posterior_is_bayes_rule():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(30, 8, generator=generator, dtype=torch.float64) + 0.5  # of unequal length
    prior = torch.randn(30, generator=generator, dtype=torch.float64).log_softmax(-1)
    level = torch.tensor([-3.0, 0.0, 1.5, -1.0], dtype=torch.float64)
    z = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    noisy = NoisyTargets(z, torch.tensor([False, False, False, True]), level)
    alpha, sigma = alpha_sigma(level)
    density = torch.distributions.Normal(alpha[:, None, None] * rows, sigma[:, None, None])
    expected = (density.log_prob(z[:, None]).sum(-1) + prior).log_softmax(-1)
    expected[3] = prior
    torch.testing.assert_close(context_free_logits(noisy, rows, prior).log_softmax(-1), expected)


def ideal_model(absorbing: float) -> DiffusionLM:
    """With a head of zeros and the Bayes skip the prediction is the exact posterior of independent tokens."""
    config = ModelConfig(vocab_size=260, embed_dim=32, width=16, layers=1, time_dim=8,
                         diffusion=DiffusionConfig(absorbing=absorbing, log_snr_range=[-9.0, 9.0]))
    config = replace(config, attention=replace(config.attention, heads=2, window=2),
                     moe=replace(config.moe, experts=1, top_k=1, ffn=8))
    model = DiffusionLM(config)
    model.init_weights(0)
    model.prior_count_V.fill_(10**9)
    model.prior_count_V[:4] = 0  # no special tokens: 256 equally likely rows
    return model


@pytest.mark.parametrize("absorbing", [0.0, 0.5])
@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("solver", SOLVERS)
def test_samplers_recover_an_ideal_denoisers_distribution(solver, steps, absorbing):
    """4,096 tokens of 256 equally likely ones: 5.51 nats are what a perfect sampler's histogram has."""
    model = ideal_model(absorbing)
    batch = generation_batch([torch.empty(0, dtype=torch.int64).numpy()] * 4, canvas_tokens=1024, pad_id=3)
    drawn = sample(model, batch, SamplerSettings(solver=solver, steps=steps))
    share = torch.bincount(drawn.tokens_CL.flatten(), minlength=260) / 4096
    assert share[:4].sum() == 0
    assert torch.special.entr(share).sum().item() >= 5.48
    nearest = model.rows()[drawn.tokens_CL.flatten()]
    residual = (drawn.estimate_NE - nearest).norm(dim=-1).median() / nearest.norm(dim=-1).mean()
    assert residual < 1e-2


def test_samples_depend_on_seed_and_sample_alone():
    model = ideal_model(0.5)
    empty = torch.empty(0, dtype=torch.int64).numpy()
    settings = SamplerSettings(steps=5, seed=7)
    together = sample(model, generation_batch([empty] * 3, canvas_tokens=32, pad_id=3, samples=[4, 9, 2]), settings)
    alone = sample(model, generation_batch([empty], canvas_tokens=32, pad_id=3, samples=[9]), settings)
    assert torch.equal(together.tokens_CL[1], alone.tokens_CL[0])
    other = sample(model, generation_batch([empty], canvas_tokens=32, pad_id=3, samples=[9]), replace(settings, seed=8))
    assert not torch.equal(other.tokens_CL, alone.tokens_CL)
