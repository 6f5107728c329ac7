"""What the hardware is, what it could do at best where that is known, and how it is made to repeat itself."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

_DENSE_BF16 = {"H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
               "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
"""FLOP/s of dense bf16 matrix products, from the makers' data sheets; the first name found in the device's counts."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Per device; None where it is not known, so that no utilisation is ever guessed."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in _DENSE_BF16.items() if model in name), None)


def processor() -> str:
    """The CPU's name, as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def flush_denormals() -> None:
    """From now on this thread, and those it starts, take numbers below 1e-38 for zero on a CPU. Gradients of improbable
    words are that small, and arithmetic with such numbers so slow that DiffuSeq's first steps took twice as long."""
    torch.set_flush_denormal(True)


def use_deterministic_kernels() -> None:
    """From now on only those that give the same bits every time; an operation that has none is an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without
    torch.use_deterministic_algorithms(True)
