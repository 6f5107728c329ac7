"""Experts on the CPU: expert by expert, each matrix product written in place and each activation computed
while its operands are still in the cache.

Any floating dtype and any size. Against a dense feed-forward of equal work it loses little more than what
reading and writing every expert's weights costs. The counts already lie on the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.moe.activation import hidden, hidden_backward

if TYPE_CHECKING:
    from model.moe.experts import Experts


def unavailable(device: torch.device, dtype: torch.dtype, width: int, ffn: int) -> str | None:
    return None if device.type == "cpu" else f"the model is on {device.type}"


def run(x_ND: Tensor, counts_E: Tensor, experts: Experts) -> Tensor:
    """See `model/moe/backends.py` for the contract."""
    return _LoopedMLP.apply(x_ND.contiguous(), experts.w1, experts.w2, experts.w3, counts_E.tolist())


def _groups(counts: list[int]):
    """(expert, its rows) of experts that have rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


class _LoopedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w1_EFD, w2_EFD, w3_EFD, counts):
        gate_NF = x_ND.new_empty(len(x_ND), w1_EFD.shape[1])
        up_NF = None if w3_EFD is None else torch.empty_like(gate_NF)
        y_ND = torch.empty_like(x_ND)
        for e, rows in _groups(counts):
            gate = torch.mm(x_ND[rows], w1_EFD[e].t(), out=gate_NF[rows])
            up = None if up_NF is None else torch.mm(x_ND[rows], w3_EFD[e].t(), out=up_NF[rows])
            torch.mm(hidden(gate, up), w2_EFD[e], out=y_ND[rows])
        ctx.save_for_backward(x_ND, w1_EFD, w2_EFD, w3_EFD, gate_NF, up_NF)
        ctx.counts = counts
        return y_ND

    @staticmethod
    def backward(ctx, grad_ND):
        x_ND, w1_EFD, w2_EFD, w3_EFD, gate_NF, up_NF = ctx.saved_tensors
        x_grad_ND = torch.empty_like(x_ND)
        w1_grad_EFD, w2_grad_EFD = torch.empty_like(w1_EFD), torch.empty_like(w2_EFD)
        w3_grad_EFD = None if w3_EFD is None else torch.empty_like(w3_EFD)
        for e, rows in _groups(ctx.counts):
            x, grad = x_ND[rows], grad_ND[rows]
            h, gate_grad, up_grad = hidden_backward(grad @ w2_EFD[e].t(), gate_NF[rows],
                                                    None if up_NF is None else up_NF[rows])
            torch.mm(h.t(), grad, out=w2_grad_EFD[e])
            torch.mm(gate_grad.t(), x, out=w1_grad_EFD[e])
            torch.mm(gate_grad, w1_EFD[e], out=x_grad_ND[rows])
            if up_grad is not None:
                torch.mm(up_grad.t(), x, out=w3_grad_EFD[e])
                x_grad_ND[rows].addmm_(up_grad, w3_EFD[e])
        for e, count in enumerate(ctx.counts):
            if count == 0:
                for grad_EFD in (w1_grad_EFD, w2_grad_EFD, w3_grad_EFD):
                    if grad_EFD is not None:
                        grad_EFD[e].zero_()
        return x_grad_ND, w1_grad_EFD, w2_grad_EFD, w3_grad_EFD, None
