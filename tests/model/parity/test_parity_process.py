"""Schedules, noising, time embedding, rounding and time sampling of the original."""

import math

import numpy as np
import pytest
import torch

from model.bert_denoiser import time_features
from model.diffusion.discrete import betas, space_timesteps
from model.diffusion.loss_second_moment import LossSecondMoment
from model.diffusion.process import add_noise
from model.diffusion.schedule import NoiseSchedule, alpha_sigma
from model.original_samplers import nearest_row
from tests.model.parity.golden import CASES, load, process
from tests.model.small import small_config

EXACT = {"rtol": 1e-10, "atol": 1e-12}
FLOAT32 = {"rtol": 1e-6, "atol": 1e-6}


def test_sqrt_schedule_and_posterior():
    golden, ours = load("schedules"), process(2000)
    for name, value in (("betas", ours.betas), ("alphas_cumprod", ours.alpha_bar),
                        ("posterior_mean_coef1", ours.mean_clean), ("posterior_mean_coef2", ours.mean_noisy),
                        ("posterior_variance", ours.variance)):
        torch.testing.assert_close(value, golden[f"T2000.{name}"], **EXACT)
    torch.testing.assert_close(ours.sampling_variance.float(), golden["T2000.fixed_large_variance_f32"],
                               rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("steps", [1000, 2000])
def test_linear_and_cosine_schedules(steps):
    """As get_named_beta_schedule of improved-diffusion computes them, step by step in numpy."""
    scale = 1000 / steps
    np.testing.assert_allclose(betas("linear", steps), np.linspace(scale * 0.0001, scale * 0.02, steps), **EXACT)
    assert torch.cumprod(1 - betas("linear", 10), 0).log().isfinite().all()  # where the formula goes beyond 1

    def signal(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    cosine = [min(1 - signal((i + 1) / steps) / signal(i / steps), 0.999) for i in range(steps)]
    np.testing.assert_allclose(betas("cosine", steps), cosine, rtol=1e-10, atol=1e-12)


def test_respaced_steps():
    golden = load("space_timesteps")
    for name in [key.removesuffix(".timestep_map") for key in golden if key.endswith("map")]:
        steps, sections = name.removeprefix("T").split("_")
        kept = space_timesteps(int(steps), sections if "ddim" in sections else [int(n) for n in sections.split("-")])
        assert kept == golden[f"{name}.timestep_map"].tolist(), name
        torch.testing.assert_close(process(int(steps)).respaced(kept).betas, golden[f"{name}.betas"], **EXACT)
    with pytest.raises(ValueError, match="30 of a section of 20"):
        space_timesteps(20, [30])
    with pytest.raises(ValueError, match="exactly 19 of 20"):
        space_timesteps(20, "ddim19")


def schedule(name: str = "sqrt", steps: int = 2000) -> NoiseSchedule:
    return NoiseSchedule(small_config(schedule=name, steps=steps))


@pytest.mark.parametrize("name", ["sqrt", "cosine", "linear"])
def test_discrete_time_has_the_levels_of_its_steps(name):
    ours, signal = schedule(name, 100), torch.cumprod(1 - betas(name, 100), 0)
    step = torch.arange(100)
    alpha, sigma = alpha_sigma(ours.log_snr((step + 0.5) / 100).double())
    torch.testing.assert_close(alpha.square(), signal, rtol=2e-6, atol=0)
    torch.testing.assert_close(sigma.square(), 1 - signal, rtol=2e-6, atol=0)
    assert ours.step(torch.tensor([0.0, 0.0099, 0.01, 1.0])).tolist() == [0, 0, 1, 99]
    between = torch.tensor([0.0, 0.3, 41.5, 98.9, 99.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(ours.step_at(ours.log_snr_at(between)), between, rtol=1e-9, atol=1e-9)
    assert (ours.low, ours.high) == pytest.approx(ours.log_snr_at(step)[[99, 0]].tolist())


def test_forward_noise_of_v1():
    golden, ours = load("q_sample_v1"), schedule()
    level_B = ours.log_snr_at(golden["t"]).float()
    level_BL = level_B[:, None].expand(golden["mask"].shape)
    noisy = add_noise(golden["x_start"].flatten(0, 1), level_BL.flatten(), golden["noise"].flatten(0, 1),
                      torch.ones(level_BL.numel()), absorbing=0.0)
    torch.testing.assert_close(noisy.z_TE, golden["x_t_nomask"].flatten(0, 1), **FLOAT32)
    mean_clean, mean_noisy = (c[golden["t"]][:, None, None].float() for c in (process(2000).mean_clean,
                                                                             process(2000).mean_noisy))
    x_t = torch.where(golden["mask"][..., None] == 1, golden["x_t_nomask"], golden["x_start"])
    torch.testing.assert_close(mean_clean * golden["x_start"] + mean_noisy * x_t, golden["posterior_mean"], **FLOAT32)


def test_forward_noise_of_v2():
    """Shift and absorption; a token whose recorded draw is 1 is given a number that absorbs it."""
    golden, m = load("v2_forward"), load("v2_forward")["mean_embed"]
    level = schedule().log_snr_at(golden["t"]).float()[:, None].expand(golden["mask"].shape).flatten()
    target = golden["mask"].flatten() == 1
    shifted, noise = (golden["x_start"] - m).flatten(0, 1), golden["noise"].flatten(0, 1)
    probability = golden["gamma0.5.absorb_prob"].flatten()
    torch.testing.assert_close(0.5 * alpha_sigma(level)[1], probability, **FLOAT32)
    uniform = torch.where(golden["gamma0.5.absorb_draw"].flatten() == 1, probability * 0.999, probability * 1.001)
    for absorbing, name in ((0.0, "x_t_shift"), (0.5, "gamma0.5.x_t")):
        noisy = add_noise(shifted[target], level[target], noise[target], uniform[target], absorbing)
        torch.testing.assert_close(noisy.z_TE + m, golden[name].flatten(0, 1)[target], **FLOAT32)
    assert noisy.absorbed_T.any() and not noisy.absorbed_T.all()


def test_time_features():
    golden = load("timestep_embedding")
    torch.testing.assert_close(time_features(golden["t"], 32), golden["even"], atol=2e-4, rtol=0)


def test_rounding():
    golden = load("rounding")
    assert torch.equal(nearest_row(golden["x"], golden["E"]), golden["nearest"])
    logits = torch.nn.functional.linear(golden["x"], golden["E"], golden["lm_head_bias"])
    assert torch.equal(logits.argmax(-1), golden["argmax"])


def test_loss_second_moment():
    golden, sampler = load("loss_aware_sampler"), LossSecondMoment(24)
    start = 0
    for cut, name in zip(golden["cut"].tolist(), ("before", "at_warmup", "final"), strict=True):
        sampler.remember(golden["ts"][start:cut], golden["losses"][start:cut])
        weights = golden[f"weights_{name}"]
        torch.testing.assert_close(sampler.probabilities(), weights / weights.sum(), **EXACT)
        start = cut
        if name == "before":
            assert torch.equal(sampler.seen_T.clamp(max=10), golden["counts_before"])
    history = torch.stack([losses.roll(-int(seen)) for losses, seen
                           in zip(sampler.losses_TK, sampler.seen_T % 10, strict=True)])
    assert torch.equal(history, golden["history_final"])

    middle = sampler.probabilities().cumsum(0) - 0.5 * sampler.probabilities()
    time = sampler.draw(middle)
    weight = sampler.weights(time)
    assert torch.equal(schedule(steps=24).step(time), torch.arange(24))
    torch.testing.assert_close(weight, golden["importance_weights_all"].float(), **FLOAT32)
    torch.testing.assert_close(weight[golden["drawn_t"]], golden["drawn_weights"], **FLOAT32)
    other = LossSecondMoment(24)
    other.load(sampler.state())
    assert torch.equal(other.probabilities(), sampler.probabilities())


def test_loss_second_moment_learns_the_same_from_any_batches():
    golden, whole, parts = load("loss_aware_sampler"), LossSecondMoment(24), LossSecondMoment(24)
    whole.remember(golden["ts"], golden["losses"])
    for step, loss in zip(golden["ts"].split(7), golden["losses"].split(7), strict=True):
        parts.remember(step, loss)
    assert torch.equal(whole.losses_TK, parts.losses_TK) and torch.equal(whole.seen_T, parts.seen_T)
    assert CASES["loss_aware_sampler"]["params"]["T"] == 24
