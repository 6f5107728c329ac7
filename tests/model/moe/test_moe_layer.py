"""The layer against its definition, and its behaviour at the edges."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from model.config import MoEConfig
from model.errors import ConfigError
from model.moe.experts import Experts
from model.moe.layer import MoELayer
from tests.model.moe import oracle

WIDTH = 12


def build(config: MoEConfig, dtype: torch.dtype = torch.float64, width: int = WIDTH) -> MoELayer:
    layer = MoELayer(width, config).to(dtype)
    layer.init_weights(seed=3, layer_index=1)
    with torch.no_grad():
        layer.router.weight.mul_(30)  # far from ties, and unequal counts
    return layer


def inputs(tokens: int, dtype: torch.dtype = torch.float64, width: int = WIDTH, rows: int = 3):
    generator = torch.Generator().manual_seed(7)
    x_TD = torch.randn(tokens, width, generator=generator, dtype=dtype).requires_grad_()
    row_T = torch.randint(rows, (tokens,), generator=generator)
    return x_TD, row_T, torch.rand(tokens, width, generator=generator, dtype=dtype)


def objective(y_TD, balance_sum, z_sum):
    """Every output under another weight, so that no gradient can hide."""
    ramp_TD = torch.linspace(-1, 2, y_TD.numel(), dtype=y_TD.dtype).view_as(y_TD)
    return (y_TD * ramp_TD).sum() + 0.3 * balance_sum + 0.2 * z_sum


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("top_k", "normalize", "gated", "jitter", "shared_ffn"), [
    *((k, n, g, 0.0, 0) for k, n, g in itertools.product((1, 2, 3), (False, True), (False, True))),
    (2, True, True, 0.2, 0), (1, False, False, 0.2, 0), (2, True, True, 0.0, 10), (2, False, False, 0.1, 10)])
def test_equals_its_definition(backend, top_k, normalize, gated, jitter, shared_ffn):
    config = MoEConfig(experts=5, top_k=top_k, ffn=9, gated=gated, normalize=normalize, jitter=jitter,
                       shared_ffn=shared_ffn, backend=backend)
    layer = build(config)
    x_TD, row_T, noise_TD = inputs(17)
    y_TD, aux = layer(x_TD, row_T, 3, noise_TD if jitter else None)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(objective(y_TD, aux.balance_sum, aux.z_sum), [x_TD, *parameters])

    factor_TD = (1 - jitter) + noise_TD * 2 * jitter if jitter else None
    wanted = oracle.moe(x_TD, row_T, 3, dict(zip(names, parameters, strict=True)), config, factor_TD)
    wanted_grads = torch.autograd.grad(objective(wanted["y_TD"], wanted["balance_sum"], wanted["z_sum"]),
                                       [x_TD, *parameters])
    torch.testing.assert_close({"y_TD": y_TD, **aux._asdict()}, wanted, rtol=1e-10, atol=1e-10)
    for name, own, want in zip(["x", *names], grads, wanted_grads, strict=True):
        torch.testing.assert_close(own, want, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
        assert own.is_contiguous(), name


@pytest.mark.parametrize("backend", ["cpu", "grouped_mm", "reference"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_gradients_are_zero_not_missing(backend, gated, tokens):
    """No tokens at all, or all of them to expert 2; under a gradient of stride 0, which kernels may refuse."""
    config = MoEConfig(experts=4, top_k=1, ffn=16, gated=gated, shared_ffn=8, backend=backend)
    layer = build(config, torch.float32, width=16)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 1
    x_TD = inputs(tokens, torch.float32, width=16)[0].detach().abs().requires_grad_()
    y_TD, aux = layer(x_TD, torch.zeros(tokens, dtype=torch.int64), 1)
    (y_TD.sum() + aux.balance_sum + aux.z_sum).backward()
    assert aux.counts_E.tolist() == [0, 0, tokens, 0]
    assert x_TD.grad.shape == (tokens, 16)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if name.startswith("experts"):
            used = parameter.grad.flatten(1).abs().amax(1) > 0
            assert used.tolist() == [False, False, tokens > 0, False], name


def test_shares_of_tokens_are_independent():
    """Each token's output is its own, whoever is beside it: a split batch gives the same rows."""
    layer = build(MoEConfig(experts=6, top_k=2, ffn=8))
    x_TD, row_T, _ = inputs(30)
    whole_TD, _ = layer(x_TD, row_T, 3)
    parts = [layer(x_TD[part], row_T[part], 3)[0] for part in (slice(0, 11), slice(11, 30))]
    torch.testing.assert_close(torch.cat(parts), whole_TD, rtol=1e-12, atol=1e-12)


def test_jitter_acts_in_training_only():
    config = MoEConfig(experts=5, top_k=2, ffn=8, jitter=0.3)
    layer = build(config)
    x_TD, row_T, noise_TD = inputs(20)
    trained_TD, _ = layer(x_TD, row_T, 3, noise_TD)
    with pytest.raises(ConfigError, match=r"model\.moe\.jitter.*jitter_noise_TD"):
        layer(x_TD, row_T, 3)
    layer.eval()
    still_TD, _ = layer(x_TD, row_T, 3, noise_TD)
    torch.testing.assert_close(still_TD, layer(x_TD, row_T, 3)[0])
    assert not torch.allclose(still_TD, trained_TD)


@pytest.mark.parametrize(("gated", "shared_ffn"), [(True, 0), (False, 0), (True, 10)])
def test_state_names_and_layout(gated, shared_ffn):
    layer = MoELayer(WIDTH, MoEConfig(experts=5, ffn=9, gated=gated, shared_ffn=shared_ffn))
    names = ("w1", "w2", "w3") if gated else ("w1", "w2")
    wanted = {"router.weight": (5, WIDTH), **{f"experts.{name}": (5, 9, WIDTH) for name in names}}
    if shared_ffn:
        wanted |= {f"shared.{name}": (1, shared_ffn, WIDTH) for name in names}
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == wanted


def test_initial_weights_belong_to_seed_layer_and_expert():
    config = MoEConfig(experts=6, ffn=40, shared_ffn=40)

    def state(seed, layer_index, **changes):
        layer = MoELayer(32, replace(config, **changes))
        layer.init_weights(seed, layer_index)
        return layer.state_dict()

    first = state(1, 0)
    for name, value in state(1, 0, experts=3).items():
        if name != "router.weight":
            assert torch.equal(value, first[name][:3]), name
    assert all(torch.equal(value, first[name]) for name, value in state(1, 0).items())
    for other in (state(2, 0), state(1, 1)):
        assert not any(torch.equal(value, first[name]) for name, value in other.items())
    stacked = [matrix for name, value in first.items() if name != "router.weight" for matrix in value]
    assert len(stacked) == 3 * (6 + 1)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(stacked, 2))
    for name, std in (("w1", 32 ** -0.5), ("w2", 40 ** -0.5), ("w3", 32 ** -0.5)):
        assert first[f"experts.{name}"].std().item() == pytest.approx(std, rel=0.05)


def test_initial_weights_do_not_depend_on_precision():
    config = MoEConfig(experts=2, ffn=16)
    low, high = MoELayer(16, config).to(torch.bfloat16), MoELayer(16, config)
    low.init_weights(1, 0)
    high.init_weights(1, 0)
    for name, value in low.state_dict().items():
        assert torch.equal(value, high.state_dict()[name].bfloat16()), name


def test_a_share_of_the_experts_draws_the_same_weights():
    whole, share = Experts(6, 16, 8), Experts(2, 16, 8)
    whole.init_weights(5, 2)
    share.init_weights(5, 2, first=4)
    for name, value in share.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name][4:]), name
