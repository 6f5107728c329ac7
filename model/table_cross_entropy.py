"""Cross-entropy of tokens against a table of embeddings, without the logits of all tokens at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_LOGITS, _LOGITS_ON_CPU = 1 << 26, 1 << 21
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
        log_sum_N, chosen_N = x_NE.new_empty(2, len(x_NE))
        for x, answer, log_sum, chosen in zip(*(each.split(ctx.rows) for each in (x_NE, answer_N, log_sum_N, chosen_N)),
                                              strict=True):
            logits = torch.addmm(bias_V, x, table_VE.T)
            torch.logsumexp(logits, -1, out=log_sum)
            chosen.copy_(logits.gather(1, answer[:, None])[:, 0])
        ctx.save_for_backward(x_NE, table_VE, bias_V, answer_N, log_sum_N)
        return log_sum_N - chosen_N

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        x_NE, table_VE, bias_V, answer_N, log_sum_N = ctx.saved_tensors
        dx_NE, dtable_VE, dbias_V = torch.empty_like(x_NE), torch.zeros_like(table_VE), torch.zeros_like(bias_V)
        for x, dx, *columns in zip(*(each.split(ctx.rows) for each in (x_NE, dx_NE, answer_N, log_sum_N, grad_N)),
                                   strict=True):
            answer, log_sum, grad = (column[:, None] for column in columns)
            dlogits = torch.addmm(bias_V, x, table_VE.T).sub_(log_sum).exp_().mul_(grad)
            dlogits.scatter_add_(1, answer, -grad)
            torch.mm(dlogits, table_VE, out=dx)
            dtable_VE.addmm_(dlogits.T, x)
            dbias_V += dlogits.sum(0)
        return dx_NE, dtable_VE, dbias_V, None
