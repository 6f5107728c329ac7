"""Which parameters AdamW treats alike: with or without weight decay, and sharded experts by themselves."""

from __future__ import annotations

from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

_TABLES = ("embedding", "denoiser.position")  # of tokens and of learned positions: no matrices


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Groups for the optimizer, each with its `name`. Their order, and that of the parameters in them, is the order
    in which ZeRO lays them out."""
    matrices = [p for name, p in model.named_parameters() if p.dim() >= 2 and name not in _TABLES]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or name in _TABLES]
    groups = [{"params": matrices, "weight_decay": weight_decay, "name": "decay"},
              {"params": others, "weight_decay": 0.0, "name": "no_decay"}]
    # Sharded experts go into groups of their own, which ZeRO partitions over the ranks that hold them.
    return [group for group in split_params_into_different_moe_groups_for_optimizer(groups) if group["params"]]
