"""Which kernels a run uses on its device, and why: decided before any data is read, said once, kept with the run."""

from __future__ import annotations

import torch

from model.attention import backends as attention
from model.config import ModelConfig
from model.moe import backends as moe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision in the DeepSpeed JSON -> type of parameters and activations."""


def chosen_kernels(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> dict[str, str]:
    """Part of the network -> "backend (reason)". BackendUnavailable where one asked for by name cannot run."""
    choices = {"attention": attention.choose_backend(config.attention.backend, device, dtype, config.head_dim)}
    if config.network == "sparse":
        choices["experts"] = moe.choose_backend(config.moe.backend, device, dtype, config.width, config.moe.ffn)
    if config.moe.shared_ffn:
        choices["shared expert"] = moe.choose_backend(config.moe.backend, device, dtype, config.width,
                                                      config.moe.shared_ffn)
    return {part: f"{backend} ({reason})" for part, (backend, reason) in choices.items()}
