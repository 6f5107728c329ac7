"""What the hardware could do at best, where it is known."""

from __future__ import annotations

import torch

_DENSE_BF16 = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
"""FLOP/s of dense bf16 matrix products, from the makers' data sheets; the first name found in the device's counts."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Per device; None where it is not known, so that no utilisation is ever guessed."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in _DENSE_BF16.items() if model in name), None)
