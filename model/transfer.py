"""How a batch and its plan get to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """x on `device`. To a GPU by way of page-locked memory: bytes of any other it takes only when it has done all that
    was asked of it before."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.contiguous().pin_memory()  # which cannot copy what is expanded
    return x.to(device, non_blocking=True)
