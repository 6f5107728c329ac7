"""Experts as a plain loop under PyTorch's own autograd: any device, dtype and size; the others' oracle.

Reads the counts on the host, which on a GPU waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.moe.activation import hidden

if TYPE_CHECKING:
    from model.moe.experts import Experts


def unavailable(device: torch.device, dtype: torch.dtype, width: int, ffn: int) -> str | None:
    return None


def run(x_ND: Tensor, counts_E: Tensor, experts: Experts) -> Tensor:
    """See `model/moe/backends.py` for the contract."""
    groups = x_ND.split(counts_E.tolist())
    # unbind, because the backward of indexing would allocate one whole weight gradient per expert
    w1, w2 = experts.w1.unbind(0), experts.w2.unbind(0)
    w3 = [None] * len(w1) if experts.w3 is None else experts.w3.unbind(0)
    return torch.cat([hidden(x @ a.t(), None if c is None else x @ c.t()) @ b
                      for x, a, b, c in zip(groups, w1, w2, w3, strict=True)])
