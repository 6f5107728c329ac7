"""The original's samplers against its numbers, and ours against the respaced DDIM and diffusers' DPM-Solver++."""

from dataclasses import replace
from itertools import repeat

import pytest
import torch
from torch import Tensor

from model import sampling
from model.config import AttentionConfig, DiffusionConfig, ModelConfig, MoEConfig
from model.diffusion.discrete import DiscreteProcess, betas, space_timesteps
from model.diffusion.schedule import NoiseSchedule
from model.diffusion_lm import DiffusionLM
from model.errors import ConfigError
from model.original_samplers import ancestral, ddim, diffuseq_v2_compat, nearest_row
from model.packing import generation_batch
from model.sampling import SamplerSettings, sample
from tests.model.parity.golden import V2, analytic_denoiser, load, network, process
from tests.model.small import batch_of, small_config, small_model

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def same(x: Tensor) -> Tensor:
    return x


def imposing(golden: dict[str, Tensor], dtype: torch.dtype = torch.float32):
    source = (golden["mask"] == 0)[..., None]
    return lambda x: torch.where(source, golden["x_start"].to(dtype), x)


@pytest.mark.parametrize("tau", [0.0, 0.8])
@pytest.mark.parametrize("name, sections", [("resp", [20]), ("ddimN", "ddim20")])
def test_respaced_ddim(name, sections, tau):
    golden, whole = load("ddim_respaced"), process(2000)
    kept = whole.respaced(space_timesteps(2000, sections))
    torch.testing.assert_close(kept.alpha_bar, golden[f"{name}.alphas_cumprod"], rtol=1e-10, atol=1e-12)
    found = ddim(kept, analytic_denoiser(golden["E"], whole.alpha_bar, tau, 0.25), golden["x_T"], imposing(golden))
    torch.testing.assert_close(found, golden[f"{name}.tau{tau}.x_final"], **CLOSE)


def test_ddim_with_noise_and_with_the_originals_gap():
    golden, whole = load("ddim_respaced"), process(2000)
    predict, noises = analytic_denoiser(golden["E"], whole.alpha_bar, 0.8, 0.25), iter(golden["eta.noises"])
    found = ddim(whole.respaced(space_timesteps(2000, [20])), predict, golden["x_T"], imposing(golden), eta=0.5,
                 noise=lambda: next(noises))
    torch.testing.assert_close(found, golden["eta.x_final"], **CLOSE)
    found = ddim(whole, predict, golden["x_T"], imposing(golden), gap=100)
    torch.testing.assert_close(found, golden["legacy_gap.x_final"], **CLOSE)


def rounding(golden: dict[str, Tensor], name: str):
    return (lambda clean: golden["E"][nearest_row(clean, golden["E"])]) if name == "rounded" else same


@pytest.mark.parametrize("tau", [0.0, 0.8])
@pytest.mark.parametrize("name", ["plain", "rounded"])
def test_ancestral(name, tau):
    golden, whole = load("ancestral"), process(2000)
    noises = iter(golden["noises"])
    found = ancestral(whole.respaced(space_timesteps(2000, [20])),
                      analytic_denoiser(golden["E"], whole.alpha_bar, tau, 0.25), golden["x_T"], imposing(golden),
                      lambda: next(noises), rounded=rounding(golden, name))
    torch.testing.assert_close(found, golden[f"{name}.tau{tau}.x_final"], **CLOSE)


@pytest.mark.parametrize("name", ["plain", "rounded"])
def test_ancestral_of_v2(name):
    golden, whole = load("v2_ancestral"), process(2000)
    noises, m = iter(golden["noises"]), golden["mean_embed"]
    draws = iter(zip(golden[f"{name}.absorb_draw"], golden[f"{name}.absorb_prob"], strict=True))

    def absorbed(x: Tensor, variance: float) -> Tensor:
        draw, probability = next(draws)
        torch.testing.assert_close(0.5 * variance ** 0.5, probability.max().item(), rtol=1e-5, atol=0)
        return torch.where(draw[..., None] == 1, m, x)

    start = torch.where(golden["mask"][..., None] == 1, golden["noise_T"] + m, golden["noise_T"])
    found = ancestral(whole.respaced(space_timesteps(2000, [20])),
                      analytic_denoiser(golden["E"], whole.alpha_bar, 0.8, 0.25), start, imposing(golden),
                      lambda: next(noises), rounded=rounding(golden, name), absorbed=absorbed)
    torch.testing.assert_close(found, golden[f"{name}.x_final"], **CLOSE)


def discrete(steps: int) -> NoiseSchedule:
    return NoiseSchedule(small_config(schedule="sqrt", steps=steps))


@pytest.mark.parametrize("steps, calls", [(2048, 23), (2000, 10), (2000, 6)])
def test_compat_solver_of_v2(steps, calls):
    golden, wide = load("diffuseq_v2_compat"), torch.float64
    predict = analytic_denoiser(golden["E"].to(wide), process(steps).alpha_bar, 0.8, 0.25)
    found = diffuseq_v2_compat(discrete(steps), predict, golden["x_T"].to(wide), imposing(golden, wide), calls)
    torch.testing.assert_close(found, golden[f"T{steps}_n{calls}.f64.x_final"], rtol=1e-6, atol=1e-6)


def ours_beside(golden: dict[str, Tensor], steps: int, start_BLE: Tensor, levels: Tensor, solver: str, tau: float,
                monkeypatch) -> Tensor:
    """The states [S, B, L, E] at which our sampler calls a network that is the analytic denoiser."""
    config = ModelConfig(
        vocab_size=len(golden["E"]), embed_dim=golden["E"].shape[1], width=16, layers=1, time_dim=8, input="noisy",
        bayes_skip=False, local_mixing=0, normalize_embeddings=False, attention=AttentionConfig(heads=1, window=4),
        moe=MoEConfig(experts=1, top_k=1, ffn=8), diffusion=DiffusionConfig(
            schedule="sqrt", steps=steps, absorbing=0.0, loss="mse", loss_over="canvas", conditioning="joint"))
    model, states = DiffusionLM(config), []
    model.init_weights(0)
    predict = analytic_denoiser(golden["E"], process(steps).alpha_bar, tau, 0.25)

    def network_call(batch, plan, noisy, guess_NE, log_snr_C):
        states.append(noisy.z_TE.view_as(start_BLE))
        step = model.schedule.step_at(log_snr_C[0]).item()
        return predict(states[-1], step).flatten(0, 1), golden["E"]

    starts = iter([*start_BLE, *repeat(torch.zeros_like(start_BLE[0]), 1000)])
    with monkeypatch.context() as patch:
        patch.setattr(model, "predict_packed", network_call)
        patch.setattr(sampling, "noise_levels", lambda model, settings: levels)
        patch.setattr(torch, "randn", lambda *shape, generator: next(starts))
        empty = torch.empty(0, dtype=torch.int64).numpy()
        batch = generation_batch([empty] * len(start_BLE), canvas_tokens=start_BLE.shape[1], pad_id=3)
        drawn = sample(model, batch, SamplerSettings(solver=solver, steps=len(levels)))
    return torch.stack([*states, drawn.estimate_NE.view_as(start_BLE)])


@pytest.mark.parametrize("tau", [0.0, 0.8])
def test_our_second_order_solver_equals_diffusers(tau, monkeypatch):
    golden = load("dpmpp_2m_diffusers")
    steps = torch.cat((golden["T2048_n23.timesteps"], torch.zeros(1, dtype=torch.int64)))
    levels = discrete(2048).log_snr_at(steps).float()
    states = ours_beside(golden, 2048, golden["noise_T"], levels, "dpmpp2m", tau, monkeypatch)
    torch.testing.assert_close(states[1:24], golden[f"T2048_n23.tau{tau}.trajectory"], **CLOSE)
    other = ours_beside(golden, 2048, golden["noise_T"], levels, "dpmpp1", tau, monkeypatch)
    assert (other[23] - golden[f"T2048_n23.tau{tau}.x_final"]).abs().max() > 0.01


def test_our_first_order_solver_equals_respaced_ddim(monkeypatch):
    """Up to the last update, which DDIM makes to the estimate itself: what our sampler returns."""
    golden, whole = load("ddim_respaced"), process(2000)
    kept = whole.respaced(space_timesteps(2000, [20]))
    predict, start = analytic_denoiser(golden["E"], whole.alpha_bar, 0.8, 0.25), golden["x_T"]
    levels = discrete(2000).log_snr_at(torch.tensor(kept.kept[::-1])).float()
    states = ours_beside(golden, 2000, start, levels, "dpmpp1", 0.8, monkeypatch)
    torch.testing.assert_close(states[-1], ddim(kept, predict, start, same), **CLOSE)


def test_only_a_correctly_spaced_solver_samples():
    """An ideal denoiser of 4,096 tokens, 256 of them equally likely, at 20 steps: respaced DDIM and ancestral sampling
    give back the distribution (5.51 nats are perfect). The compat solver gives one token, and the original's gap ends
    far from any."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(256, 32, generator=generator)
    table = table / table.norm(dim=-1, keepdim=True) * 32 ** 0.5
    whole = process(2000)
    kept = whole.respaced(space_timesteps(2000, [20]))
    predict = analytic_denoiser(table, whole.alpha_bar, tau=0.0, kappa=0.0)
    start = torch.randn(1, 4096, 32, generator=generator)

    def judged(x: Tensor) -> tuple[float, float]:
        token = nearest_row(x, table)
        share = torch.bincount(token.flatten(), minlength=256) / token.numel()
        return torch.special.entr(share).sum().item(), ((x - table[token]).norm(dim=-1) / 32 ** 0.5).median().item()

    for good in (ddim(kept, predict, start, same),
                 ancestral(kept, predict, start, same, lambda: torch.randn(start.shape, generator=generator))):
        entropy, residual = judged(good)
        assert entropy >= 5.48 and residual < 1e-2
    assert judged(diffuseq_v2_compat(discrete(2000), predict, start, same, 20))[0] < 1.0
    assert judged(ddim(whole, predict, start, same, gap=100))[1] > 0.5


@pytest.mark.parametrize("solver", ["diffuseq_v2_compat", "ancestral", "dpmpp2m"])
def test_imported_model_generates(solver):
    model = network("network_v2_state", **V2)
    batch = replace_tokens(batch_of([3, 4], source_tokens=(5, 6, 4, 7)), model.config.vocab_size)
    settings = SamplerSettings(solver=solver, steps=4, clamp=solver == "ancestral")
    drawn = sample(model, batch, settings)
    assert drawn.tokens_CL.shape == (2, 12) and drawn.estimate_NE.isfinite().all()
    assert torch.equal(sample(model, batch, settings).tokens_CL, drawn.tokens_CL)


def replace_tokens(batch, vocab_size: int):
    return replace(batch, tokens_T=batch.tokens_T % vocab_size)


def test_compat_in_a_run_tells_the_network_the_originals_times():
    """1000 at first, which no step of the training has; it starts from plain noise."""
    model, seen = network("network_state"), []
    model.denoiser.register_forward_pre_hook(lambda module, given: seen.append(given))
    batch = replace_tokens(batch_of([3], source_tokens=(25,)), model.config.vocab_size)
    sample(model, batch, SamplerSettings(solver="diffuseq_v2_compat", steps=10))
    times = [model.schedule.step_at(level_C).item() / 2 for _, level_C, _ in seen]
    assert times == pytest.approx([1000 - 99.95 * call for call in range(10)], abs=1e-3)
    assert seen[0][0][batch.is_target_T].std() == pytest.approx(1, abs=0.1)
    sources = [inputs_TE[~batch.is_target_T] for inputs_TE, _, _ in seen]
    assert all(torch.equal(source, model.rows()[batch.tokens_T[~batch.is_target_T]]) for source in sources)
    with pytest.raises(ConfigError, match=r"sample\.solver"):
        sample(small_model(small_config()), batch, SamplerSettings(solver="diffuseq_v2_compat", steps=2))


def test_discrete_coefficients_do_not_depend_on_how_they_are_reached():
    """Respacing to every step is no change, and respacing twice is respacing once."""
    whole = process(300)
    torch.testing.assert_close(whole.respaced(list(range(300))).betas, betas("sqrt", 300), rtol=1e-12, atol=1e-14)
    twice: DiscreteProcess = whole.respaced(list(range(0, 300, 3))).respaced(list(range(0, 100, 5)))
    assert twice.kept == list(range(0, 300, 15))
    torch.testing.assert_close(twice.alpha_bar, whole.alpha_bar[::15], rtol=1e-12, atol=1e-14)
