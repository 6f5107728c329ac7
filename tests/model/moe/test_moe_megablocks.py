"""The real MegaBlocks: our layer equals its dMoE (its `grouped` implementation) in outputs, gradients and both losses,
and its kernels, working on our parameters, equal the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from model.config import MoEConfig
from model.moe.backends import choose_backend
from model.moe.layer import MoELayer
from tests.model.moe.megablocks_on_cpu import megablocks_layers
from tests.model.moe.test_moe_backends import COUNTS, check_saved_weights, relative, run

EXPERTS, WIDTH, FFN, TOKENS = 5, 64, 32, 24

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def megablocks():
    with megablocks_layers() as layers:
        yield layers


@pytest.mark.parametrize("backend", ["cpu", "grouped_mm", "megablocks"])
@pytest.mark.parametrize(("gated", "top_k", "normalize", "jitter"), [
    (True, 1, False, 0.0), (True, 2, True, 0.0), (True, 3, False, 0.1),
    (False, 1, False, 0.1), (False, 2, False, 0.0), (False, 3, True, 0.0)])
def test_equals_dmoe(megablocks, backend, gated, top_k, normalize, jitter):
    arguments = megablocks.arguments.Arguments(
        hidden_size=WIDTH, ffn_hidden_size=FFN, num_layers=1, bias=False, return_bias=False, fp16=False, bf16=False,
        activation_fn=F.silu if gated else partial(F.gelu, approximate="tanh"), mlp_type="glu" if gated else "mlp",
        mlp_impl="grouped", moe_num_experts=EXPERTS, moe_top_k=top_k, moe_jitter_eps=jitter or None,
        moe_normalize_expert_weights=1 if normalize else None, moe_loss_weight=1.0, moe_zloss_weight=1.0,
        device=torch.device("cpu"))
    theirs = megablocks.dmoe.dMoE(arguments).train()
    layer = MoELayer(WIDTH, MoEConfig(experts=EXPERTS, top_k=top_k, ffn=FFN, gated=gated, normalize=normalize,
                                      jitter=jitter, backend=backend))
    layer.init_weights(0, 0)
    pairs = {"router.weight": theirs.router.layer.weight, "experts.w1": theirs.experts.mlp.w1,
             "experts.w2": theirs.experts.mlp.w2}
    if gated:
        pairs["experts.w3"] = theirs.experts.mlp.v1
    with torch.no_grad():
        layer.router.weight.mul_(10)
        for name, parameter in pairs.items():
            parameter.copy_(layer.state_dict()[name].view_as(parameter))

    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    grad_TD = torch.randn(TOKENS, WIDTH, generator=generator)
    torch.manual_seed(2)
    noise_TD = torch.rand(TOKENS, WIDTH)
    y_TD, aux = layer(x_TD, torch.zeros(TOKENS, dtype=torch.int64), 1, noise_TD)
    balance, z = aux.balance_sum / TOKENS, aux.z_sum / TOKENS
    ours = torch.autograd.grad([y_TD, balance, z], [x_TD, *(layer.get_parameter(name) for name in pairs)],
                               [grad_TD, torch.ones(()), torch.ones(())])

    megablocks.moe.clear_load_balancing_loss()
    megablocks.router.clear_router_zloss()
    torch.manual_seed(2)  # dMoE draws the same noise itself
    their_y_TD = theirs(x_TD[:, None])[:, 0]
    their_balance = megablocks.moe.batched_load_balancing_loss(arguments)
    their_z = megablocks.router.batched_router_zloss(arguments)[0]
    wanted = torch.autograd.grad([their_y_TD, their_balance, their_z], [x_TD, *pairs.values()],
                                 [grad_TD, torch.ones(()), torch.ones(())])

    torch.testing.assert_close((y_TD, balance, z), (their_y_TD, their_balance, their_z), rtol=1e-5, atol=2e-6)
    for name, own, want in zip(["x", *pairs], ours, wanted, strict=True):
        torch.testing.assert_close(own, want.view_as(own), rtol=1e-4, atol=1e-5,
                                   msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)])
def test_its_products_equal_the_reference(megablocks, dtype, tolerance, gated, counts):
    own, wanted = run("megablocks", counts, gated, dtype), run("reference", counts, gated, torch.float64)
    assert relative(own, wanted) < tolerance


def run_layer(backend: str, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """[y, gradients of x and all parameters] in fp32. Routed and shared experts get the same gradient, so that nobody
    may write into it; routing is that of bf16 numbers."""
    layer = MoELayer(WIDTH, MoEConfig(experts=EXPERTS, top_k=2, ffn=FFN, shared_ffn=FFN, backend=backend))
    layer.init_weights(0, 0)
    layer.to(torch.bfloat16).to(dtype)
    x_TD = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16().to(dtype).requires_grad_()
    y_TD, _ = layer(x_TD, torch.zeros(tokens, dtype=torch.int64), 1)
    grads = torch.autograd.grad(y_TD.square().sum(), [x_TD, *layer.parameters()])
    return [value.float() for value in (y_TD.detach(), *grads)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_whole_layer_equals_the_reference(megablocks, dtype, tolerance):
    assert relative(run_layer("megablocks", 30, dtype), run_layer("reference", 30, torch.float64)) < tolerance


def test_no_tokens(megablocks):
    own, wanted = (run_layer(backend, 0, torch.float32) for backend in ("megablocks", "reference"))
    assert [value.shape for value in own] == [value.shape for value in wanted] and not any(map(torch.any, own))


@pytest.mark.parametrize("gated", [True, False])
def test_nothing_saved_for_backward_is_a_view_of_a_weight(megablocks, gated):
    check_saved_weights("megablocks", gated)


def test_a_choice_says_which_parts_are_replaced(megablocks):
    assert choose_backend("megablocks", "cpu", torch.float32, WIDTH, FFN) == (
        "megablocks", "asked for by name; with PyTorch in place of megablocks_ops and grouped_gemm")
    assert choose_backend("auto", "cpu", torch.float32, WIDTH, FFN)[0] == "cpu"
