"""What MegaBlocks' grouped dMoE needs of its compiled extension `megablocks_ops`, in PyTorch on any device.

Stands in for it where it could not be built. Signatures and in-place outputs are the extension's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sort(keys_N: Tensor, end_bit: int, sorted_N: Tensor, order_N: Tensor) -> None:
    """Stable, ascending; `order_N` is where each came from. The extension looks at the lowest `end_bit` bits only,
    which hold all of an expert's number."""
    torch.sort(keys_N, stable=True, out=(sorted_N, order := torch.empty_like(keys_N, dtype=torch.int64)))
    order_N.copy_(order)


def histogram(keys_N: Tensor, bins: int) -> Tensor:
    """int32: how often each of 0 ... bins - 1 occurs."""
    counts = torch.zeros(bins, dtype=torch.int32, device=keys_N.device)
    return counts.index_add_(0, keys_N, torch.ones_like(keys_N, dtype=torch.int32))


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(x.cumsum(dim))


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(x.cumsum(dim) - x)
