"""Sorting loses nothing and doubles nothing."""

from __future__ import annotations

import pytest
import torch

from model.moe.dispatch import gather_from_experts, scatter_to_experts, sort_by_expert


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (50, 1), (50, 3)])
def test_sorted_order_is_a_stable_permutation(tokens, top_k):
    generator = torch.Generator().manual_seed(0)
    index_Tk = torch.rand(tokens, 5, generator=generator).argsort(-1)[:, :top_k]
    order = sort_by_expert(index_Tk)
    assert order.place_Tk.flatten()[order.assignment_N].tolist() == list(range(tokens * top_k))
    by_expert = [(index_Tk[token, slot].item(), token) for token in range(tokens) for slot in range(top_k)]
    wanted = sorted(by_expert)
    assert [(index_Tk.flatten()[a].item(), t.item()) for a, t in
            zip(order.assignment_N, order.token_N, strict=True)] == wanted


def test_there_and_back_is_the_sum_of_the_weights():
    generator = torch.Generator().manual_seed(0)
    index_Tk = torch.rand(40, 6, generator=generator).argsort(-1)[:, :2]
    x_TD = torch.randn(40, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight_Tk = torch.rand(40, 2, generator=generator, dtype=torch.float64).requires_grad_()
    order = sort_by_expert(index_Tk)

    def there_and_back(x_TD, weight_Tk):
        return gather_from_experts(scatter_to_experts(x_TD, order), weight_Tk, order)

    torch.testing.assert_close(there_and_back(x_TD, weight_Tk), x_TD * weight_Tk.sum(1, keepdim=True))
    assert torch.autograd.gradcheck(there_and_back, (x_TD, weight_Tk))
