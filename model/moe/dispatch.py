"""Tokens to their experts and back, without dropping and without padding.

N = T * k assignments, sorted by expert; ties keep the order of the tokens. Both directions are gathers,
forward and backward, so that no atomic addition makes a result depend on timing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Order(NamedTuple):
    """assignment_N: which of the T * k assignments (token-major) lies in sorted place n. token_N: its token.
    place_Tk: the sorted place of each assignment."""

    assignment_N: Tensor
    token_N: Tensor
    place_Tk: Tensor


def sort_by_expert(expert_index_Tk: Tensor) -> Order:
    """Order of the assignments `expert_index_Tk` (int64)."""
    assignment_N = expert_index_Tk.flatten().argsort(stable=True)
    place_N = torch.empty_like(assignment_N)
    place_N[assignment_N] = torch.arange(len(place_N), device=place_N.device)
    k = expert_index_Tk.shape[1]
    return Order(assignment_N, assignment_N // k, place_N.view(-1, k))


def scatter_to_experts(x_TD: Tensor, order: Order) -> Tensor:
    """[N, D], every token once for each of its experts, in sorted order."""
    return _Scatter.apply(x_TD, order)


def restore_order(y_ND: Tensor, order: Order) -> Tensor:
    """Undoes `scatter_to_experts` where each token has one expert (k = 1)."""
    place_N = order.place_Tk[:, 0]
    return _Scatter.apply(y_ND, Order(place_N, place_N, order.assignment_N[:, None]))


def gather_from_experts(y_ND: Tensor, weight_Tk: Tensor, order: Order) -> Tensor:
    """[T, D], every token's sum of its experts' outputs times weight_Tk."""
    return _Gather.apply(y_ND, weight_Tk, order)


def _sum_places(y_ND: Tensor, place_Tk: Tensor, weight_Tk: Tensor | None = None) -> Tensor:
    """sum over k of (weight times) y at place, in one pass over memory."""
    if len(place_Tk) == 0:
        return y_ND.new_empty(0, y_ND.shape[1])
    return F.embedding_bag(place_Tk, y_ND, mode="sum", per_sample_weights=weight_Tk)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, order):
        ctx.save_for_backward(order.place_Tk)
        return x_TD.index_select(0, order.token_N)

    @staticmethod
    def backward(ctx, grad_ND):
        place_Tk, = ctx.saved_tensors
        return _sum_places(grad_ND, place_Tk), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND, weight_Tk, order):
        ctx.save_for_backward(y_ND, weight_Tk, *order)
        return _sum_places(y_ND, order.place_Tk, weight_Tk.to(y_ND.dtype))

    @staticmethod
    def backward(ctx, grad_TD):
        y_ND, weight_Tk, assignment_N, token_N, place_Tk = ctx.saved_tensors
        grad_ND = grad_TD.index_select(0, token_N)
        weight_grad_N = torch.linalg.vecdot(grad_ND, y_ND).to(weight_Tk.dtype)
        y_grad_ND = grad_ND.mul_(weight_Tk.flatten()[assignment_N, None].to(y_ND.dtype))
        return y_grad_ND, weight_grad_N[place_Tk], None
