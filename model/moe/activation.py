"""The experts' nonlinearity and its derivative, for backends that write their own backward.

Gated: h = silu(gate) * up. Ungated (up is None): h = gelu(gate), tanh approximation, as in MegaBlocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hidden(gate_NF: Tensor, up_NF: Tensor | None) -> Tensor:
    """h [N, F] from the projections by w1 (gate) and w3 (up)."""
    if up_NF is None:
        return F.gelu(gate_NF, approximate="tanh")
    return F.silu(gate_NF) * up_NF


def hidden_backward(grad_NF: Tensor, gate_NF: Tensor,
                    up_NF: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(h, gradient of gate, gradient of up), all [N, F], from the gradient of h, which may be overwritten."""
    if up_NF is None:
        gate_grad_NF = torch.ops.aten.gelu_backward(grad_NF, gate_NF, approximate="tanh")
        return hidden(gate_NF, None), gate_grad_NF, None
    silu_NF = F.silu(gate_NF)
    gate_grad_NF = torch.ops.aten.silu_backward(grad_NF * up_NF, gate_NF)
    up_grad_NF = grad_NF.mul_(silu_NF)
    return silu_NF.mul_(up_NF), gate_grad_NF, up_grad_NF
