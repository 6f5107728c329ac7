"""Equality with transformers' Mixtral block: live, and with recorded numbers of transformers 5.23.0.

The recordings hold weights, inputs, outputs, both balance losses and gradients of sum(output * grad_seed) +
0.5 * load_balancing_loss; Mixtral's balance loss is k times ours per token.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.config import MoEConfig
from model.moe.layer import MoELayer

DATA = Path(__file__).parents[2] / "data"


def from_mixtral(gate_weight, gate_up_proj, down_proj, top_k, backend="auto") -> MoELayer:
    """gate_weight [E, D], gate_up_proj [E, 2F, D] (w1 above w3), down_proj [E, D, F]."""
    experts, double_ffn, width = gate_up_proj.shape
    layer = MoELayer(width, MoEConfig(experts=experts, top_k=top_k, ffn=double_ffn // 2, backend=backend))
    w1, w3 = gate_up_proj.chunk(2, dim=1)
    layer.load_state_dict({"router.weight": gate_weight, "experts.w1": w1, "experts.w3": w3,
                           "experts.w2": down_proj.transpose(1, 2)})
    return layer


def one_row(x_TD):
    return torch.zeros(len(x_TD), dtype=torch.int64)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (8, 2), (6, 3)])
@pytest.mark.parametrize("backend", ["cpu", "grouped_mm", "reference"])
def test_equals_mixtral_block(experts, top_k, backend):
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = modeling.MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=experts,
                                    num_experts_per_tok=top_k)
    block = modeling.MixtralSparseMoeBlock(config)
    generator = torch.Generator().manual_seed(experts)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.2, generator=generator)
    layer = from_mixtral(block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj, top_k, backend)
    x_TD = torch.randn(70, 32, generator=generator).requires_grad_()
    grad_TD = torch.randn(70, 32, generator=generator)

    y_TD, _ = layer(x_TD, one_row(x_TD), 1)
    wanted_TD = block(x_TD[None])[0]
    torch.testing.assert_close(y_TD, wanted_TD, rtol=1e-5, atol=2e-6)
    own = torch.autograd.grad(y_TD, [x_TD, layer.router.weight, layer.experts.w2], grad_TD)
    wanted = torch.autograd.grad(wanted_TD, [x_TD, block.gate.weight, block.experts.down_proj], grad_TD)
    torch.testing.assert_close(own, (*wanted[:2], wanted[2].transpose(1, 2)), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("file", "top_k"), [("moe_mixtral_E8_k2", 2), ("moe_mixtral_E4_k1", 1)])
def test_equals_recorded_mixtral(file, top_k):
    recorded = load_file(DATA / f"{file}.safetensors")
    layer = from_mixtral(recorded["gate.weight"], recorded["experts.gate_up_proj"], recorded["experts.down_proj"],
                         top_k)
    x_TD = recorded["x"].flatten(0, 1).requires_grad_()
    tokens = len(x_TD)
    y_TD, aux = layer(x_TD, one_row(x_TD), 1)
    balance = top_k * aux.balance_sum / tokens
    assert torch.equal(aux.expert_index_Tk, recorded["top_k_index"])
    assert torch.equal(aux.counts_E, recorded["tokens_per_expert"])
    torch.testing.assert_close(y_TD, recorded["output"].flatten(0, 1), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(balance, recorded["load_balancing_loss"], rtol=1e-6, atol=1e-6)

    scalar = (y_TD * recorded["grad_seed"].flatten(0, 1)).sum() + 0.5 * balance
    own = torch.autograd.grad(scalar, [x_TD, layer.router.weight, layer.experts.w2])
    wanted = (recorded["grad.x"].flatten(0, 1), recorded["grad.gate.weight"],
              recorded["grad.experts.down_proj"].transpose(1, 2))
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=2e-4)

    # the masked loss is that of the real tokens alone: a packed stream holds no others
    real_TD = x_TD[recorded["attention_mask"].flatten().bool()]
    _, aux = layer(real_TD, one_row(real_TD), 1)
    torch.testing.assert_close(top_k * aux.balance_sum / len(real_TD), recorded["load_balancing_loss_masked"],
                               rtol=1e-6, atol=1e-6)
