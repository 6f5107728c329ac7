"""What MegaBlocks needs of the package `grouped_gemm`, through PyTorch's grouped matrix product.

Stands in for it where it could not be built. Unlike the package it takes batch sizes on the device, so that nobody
waits for it.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from model.moe.grouped_mm import row_major

backend = ops = sys.modules[__name__]  # the package's two modules, of which MegaBlocks takes gmm


def gmm(a_NK: Tensor, b_EKM: Tensor, batch_sizes_E: Tensor, trans_b: bool = False) -> Tensor:
    """[N, M]: the rows of a, batch_sizes_E of them for each matrix in turn, times b [E, K, M], or with `trans_b`
    times the transpose of b [E, M, K]. Differentiable in a and b."""
    ends_E = batch_sizes_E.to(a_NK.device).cumsum(0).to(torch.int32)
    return _Product.apply(row_major(a_NK), b_EKM, ends_E, trans_b)


class _Product(torch.autograd.Function):
    """Written out so that the saved b is the parameter itself, not a transposed view of it."""

    @staticmethod
    def forward(ctx, a_NK, b, ends_E, trans_b):
        ctx.save_for_backward(a_NK, b, ends_E)
        ctx.trans_b = trans_b
        return grouped_mm(a_NK, b.mT if trans_b else b, offs=ends_E)

    @staticmethod
    def backward(ctx, grad_NM):
        a_NK, b, ends_E = ctx.saved_tensors
        grad_NM = row_major(grad_NM)
        left, right = (grad_NM, a_NK) if ctx.trans_b else (a_NK, grad_NM)
        return (grouped_mm(grad_NM, b if ctx.trans_b else b.mT, offs=ends_E),
                grouped_mm(left.mT, right, offs=ends_E), None, None)
