"""Experts through PyTorch's grouped matrix product: one launch for all experts, counts stay on the device.

bf16 on CUDA, fp32 and bf16 on the CPU. The backward is written out so that only the two projections are kept
(not the products of the activation) and so that the saved weights are the parameters themselves: a saved view
would keep weights alive that ZeRO-3 has released.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from model.moe.activation import hidden, hidden_backward

if TYPE_CHECKING:
    from model.moe.experts import Experts

_ALIGNMENT = 16
"""Bytes: the kernel requires every stride to be a multiple."""


def unavailable(device: torch.device, dtype: torch.dtype, width: int, ffn: int) -> str | None:
    supported = {"cuda": (torch.bfloat16,), "cpu": (torch.float32, torch.bfloat16)}.get(device.type, ())
    if dtype not in supported:
        return f"it has no {dtype} on {device.type} (bf16 on cuda; fp32 or bf16 on cpu)"
    for key, size in (("model.width", width), ("model.moe.ffn or model.moe.shared_ffn", ffn)):
        if size * dtype.itemsize % _ALIGNMENT:
            return f"{key} = {size} must be a multiple of {_ALIGNMENT // dtype.itemsize} for {dtype}"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"the GPU has compute capability {capability[0]}.{capability[1]}, it needs 8.0"
    return None


def run(x_ND: Tensor, counts_E: Tensor, experts: Experts) -> Tensor:
    """See `model/moe/backends.py` for the contract."""
    ends_E = counts_E.cumsum(0).to(torch.int32)
    return _GroupedMLP.apply(row_major(x_ND), experts.w1, experts.w2, experts.w3, ends_E)


def row_major(x_ND: Tensor) -> Tensor:
    """Not `contiguous`, which leaves an expanded tensor of one row as it is; the kernel refuses its strides."""
    if x_ND.stride() == (x_ND.shape[1], 1):
        return x_ND
    return x_ND.clone(memory_format=torch.contiguous_format)


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w1_EFD, w2_EFD, w3_EFD, ends_E):
        gate_NF = grouped_mm(x_ND, w1_EFD.mT, offs=ends_E)
        up_NF = None if w3_EFD is None else grouped_mm(x_ND, w3_EFD.mT, offs=ends_E)
        ctx.save_for_backward(x_ND, w1_EFD, w2_EFD, w3_EFD, gate_NF, up_NF, ends_E)
        return grouped_mm(hidden(gate_NF, up_NF), w2_EFD, offs=ends_E)

    @staticmethod
    def backward(ctx, grad_ND):
        x_ND, w1_EFD, w2_EFD, w3_EFD, gate_NF, up_NF, ends_E = ctx.saved_tensors
        grad_ND = row_major(grad_ND)
        hidden_grad_NF = grouped_mm(grad_ND, w2_EFD.mT, offs=ends_E)
        h_NF, gate_grad_NF, up_grad_NF = hidden_backward(hidden_grad_NF, gate_NF, up_NF)
        unused_E11 = (ends_E.diff(prepend=ends_E.new_zeros(1)) == 0)[:, None, None]

        def weight_gradient(left_NA: Tensor, right_NB: Tensor) -> Tensor:
            # On Blackwell the product of no rows was seen to be whatever stood in memory (pytorch issue 172439).
            return grouped_mm(left_NA.mT, right_NB, offs=ends_E).masked_fill_(unused_E11, 0)

        w2_grad_EFD = weight_gradient(h_NF, grad_ND)
        w1_grad_EFD = weight_gradient(gate_grad_NF, x_ND)
        x_grad_ND = grouped_mm(gate_grad_NF, w1_EFD, offs=ends_E)
        w3_grad_EFD = None
        if up_grad_NF is not None:
            w3_grad_EFD = weight_gradient(up_grad_NF, x_ND)
            x_grad_ND += grouped_mm(up_grad_NF, w3_EFD, offs=ends_E)
        return x_grad_ND, w1_grad_EFD, w2_grad_EFD, w3_grad_EFD, None
