"""The kernels there are, and which one runs here."""

from __future__ import annotations

import torch

from model.attention import cpu_band, flash_attn, reference, torch_flash
from model.attention.masked import MaskedBlocks
from model.attention.segments import Kernel, Segments
from model.errors import BackendUnavailable, ConfigError

_KERNELS = {"flash_attn": flash_attn.FlashAttn, "torch_flash": torch_flash.TorchFlash,
            "cpu_band": cpu_band.CpuBand, "reference": reference.Reference}
UNAVAILABLE = {"flash_attn": flash_attn.unavailable, "torch_flash": torch_flash.unavailable,
               "cpu_band": cpu_band.unavailable, "reference": reference.unavailable}
"""Backend -> function of (device, dtype, head_dim) that says why it cannot run there, or None; in auto's order."""
_KEY = "model.attention.backend"


def choose_backend(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """(backend, reason). `auto` takes the first that runs, in the order flash_attn, torch_flash, cpu_band,
    reference, and says why not an earlier one. Any other name is that backend or raises BackendUnavailable."""
    device = torch.device(device)
    reasons = {}
    for candidate, unavailable in UNAVAILABLE.items():
        reasons[candidate] = unavailable(device, dtype, head_dim)
    works = next(candidate for candidate, reason in reasons.items() if reason is None)
    if name == "auto":
        refused = dict.fromkeys(reason for reason in reasons.values() if reason is not None)
        skipped = [f"not {', '.join(name for name, why in reasons.items() if why == reason)}: {reason}"
                   for reason in refused]
        return works, "; ".join([f"the fastest on '{device.type}' with {dtype} and head width {head_dim}", *skipped])
    if name not in reasons:
        raise ConfigError(_KEY, f"'{name}' is not a backend; choose auto, {', '.join(reasons)}")
    if reasons[name] is not None:
        raise BackendUnavailable(_KEY, f"'{name}' cannot run here: {reasons[name]}. Use auto, which would pick "
                                       f"'{works}'")
    return name, "asked for by name"


def build_kernel(name: str, segments: Segments, *, heads: int, head_dim: int, dtype: torch.dtype) -> Kernel:
    """The kernel of backend `name` for q, k, v of `heads` heads; `segments` lie on the CPU."""
    if segments.masks_S is not None and name != "cpu_band":
        return MaskedBlocks.build(segments)
    return _KERNELS[name].build(segments, heads=heads, head_dim=head_dim, dtype=dtype)
