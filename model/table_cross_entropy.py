"""Cross-entropy of tokens against a table of embeddings, without the logits of all tokens at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_LOGITS, _LOGITS_ON_CPU = 1 << 26, 1 << 20
"""Logits that are there at a time, and at least one token's: enough to fill a device; on a CPU what its cache holds."""


def table_cross_entropy(x_NE: Tensor, table_VE: Tensor, bias_V: Tensor, answer_N: Tensor) -> Tensor:
    """-log softmax(x @ table^T + bias)[answer], [N]. bias_V: -inf for tokens that are never meant; answers are others.

    The logits are worked out once more in the backward pass instead of being kept: N * V numbers are the most that a
    loss over a whole vocabulary holds, and the product is short, E being small.
    """
    return _TableCrossEntropy.apply(x_NE, table_VE, bias_V, answer_N)


class _TableCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_NE: Tensor, table_VE: Tensor, bias_V: Tensor, answer_N: Tensor) -> Tensor:
        ctx.rows = max(1, (_LOGITS_ON_CPU if x_NE.device.type == "cpu" else _LOGITS) // len(table_VE))
        # A copy: under ZeRO-3 a parameter may be elsewhere by the time of the backward pass.
        bias_V = bias_V.clone()
        loss_N = x_NE.new_empty(len(x_NE))
        for x, answer, loss in zip(x_NE.split(ctx.rows), answer_N.split(ctx.rows), loss_N.split(ctx.rows), strict=True):
            log_share = torch.addmm(bias_V, x, table_VE.T).log_softmax(-1)
            torch.neg(log_share.gather(1, answer[:, None])[:, 0], out=loss)
        ctx.save_for_backward(x_NE, table_VE, bias_V, answer_N)
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        x_NE, table_VE, bias_V, answer_N = ctx.saved_tensors
        # The gradient of token n's logits is grad_n (share - 1[answer_n]); both terms are scaled outside of N * V.
        scaled_NE, dx_NE = grad_N[:, None] * x_NE, torch.empty_like(x_NE)
        dtable_VE = torch.zeros_like(table_VE).index_add_(0, answer_N, scaled_NE, alpha=-1)
        dbias_V = torch.zeros_like(bias_V).index_add_(0, answer_N, grad_N, alpha=-1)
        for x, scaled, grad, dx in zip(*(each.split(ctx.rows) for each in (x_NE, scaled_NE, grad_N, dx_NE)),
                                       strict=True):
            share = torch.addmm(bias_V, x, table_VE.T).softmax(-1)
            torch.mm(share, table_VE, out=dx)
            dtable_VE.addmm_(share.T, scaled)
            dbias_V.addmv_(share.T, grad)
        dx_NE.sub_(table_VE.index_select(0, answer_N)).mul_(grad_N[:, None])
        return dx_NE, dtable_VE, dbias_V, None
