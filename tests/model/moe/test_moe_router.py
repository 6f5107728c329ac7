"""The router's losses and precision."""

from __future__ import annotations

import pytest
import torch

from model.config import MoEConfig
from model.moe.layer import MoELayer
from model.moe.router import Router


def router(experts=6, top_k=2, width=16, seed=0) -> Router:
    made = Router(width, experts, top_k, normalize=True, jitter=0.0)
    made.init_weights(seed, 0)
    with torch.no_grad():
        made.weight.mul_(20)
    return made


def uneven(tokens: int, seed: int = 0):
    """Three rows of unequal length whose tokens favour different experts."""
    generator = torch.Generator().manual_seed(seed)
    row_T = torch.arange(tokens).mul(tokens).sqrt().mul(3).div(tokens).long().clamp(max=2)
    return torch.randn(tokens, 16, generator=generator) + 2 * torch.randn(3, 16, generator=generator)[row_T], row_T


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_of_one_row_is_the_batch_loss(top_k):
    """E / (T k) * sum over experts of count * mean probability: MegaBlocks' loss with weight 1 for one layer."""
    made, (x_TD, _) = router(top_k=top_k), uneven(50)
    _, aux = made(x_TD, torch.zeros(50, dtype=torch.int64), 1)
    probability_TE = (x_TD @ made.weight.t()).softmax(-1)
    counts_E = torch.bincount(probability_TE.topk(top_k).indices.flatten(), minlength=6)
    wanted = 6 / (50 * top_k) * torch.dot(counts_E.float(), probability_TE.mean(0))
    torch.testing.assert_close(aux.balance_sum / 50, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("split", [[[0, 1, 2]], [[0], [1], [2]], [[2, 0], [1]]])
def test_sums_do_not_depend_on_how_rows_are_spread(split):
    made, (x_TD, row_T) = router(), uneven(60)
    _, whole = made(x_TD, row_T, 3)
    whole_grad, = torch.autograd.grad(whole.balance_sum, made.weight)
    totals, grad = [0, 0, 0, 0], torch.zeros_like(made.weight)
    for rows in split:
        member_T = torch.isin(row_T, torch.tensor(rows))
        renumbered_T = torch.tensor([rows.index(r) for r in row_T[member_T].tolist()])
        _, part = made(x_TD[member_T], renumbered_T, len(rows))
        grad += torch.autograd.grad(part.balance_sum, made.weight, retain_graph=True)[0]
        totals = [total + value for total, value in zip(totals, part[:4], strict=True)]
    torch.testing.assert_close(totals, list(whole[:4]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, whole_grad, rtol=1e-4, atol=1e-5)
    _, one_row = made(x_TD, torch.zeros_like(row_T), 1)
    assert abs(one_row.balance_sum - whole.balance_sum) > 1  # the rows differ, so the test can fail


def test_an_empty_row_counts_nothing():
    made, (x_TD, row_T) = router(), uneven(20)
    _, without = made(x_TD, row_T, 3)
    _, beside = made(x_TD, row_T * 2, 7)
    torch.testing.assert_close(without[:4], beside[:4])


@pytest.mark.parametrize("autocast", [False, True])
def test_router_computes_in_fp32(autocast):
    """From the same bf16 numbers the choice and the weights are those of fp32 arithmetic, bit for bit."""
    layer = MoELayer(64, MoEConfig(experts=16, top_k=2, ffn=16)).to(torch.bfloat16)
    layer.init_weights(0, 0)
    x_TD = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    row_T = torch.zeros(200, dtype=torch.int64)
    exact = MoELayer(64, MoEConfig(experts=16, top_k=2, ffn=16))
    exact.load_state_dict(layer.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        weight_Tk, aux = layer.router(x_TD, row_T, 1)
    wanted_Tk, wanted = exact.router(x_TD.float(), row_T, 1)
    assert weight_Tk.dtype == torch.float32
    assert torch.equal(weight_Tk, wanted_Tk)
    assert torch.equal(aux.expert_index_Tk, wanted.expert_index_Tk)
    assert aux.z_sum == wanted.z_sum
