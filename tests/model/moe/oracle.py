"""The layer's definition, token by token and expert by expert, without sorting; differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import MoEConfig


def expert(x_D: Tensor, w1_FD: Tensor, w2_FD: Tensor, w3_FD: Tensor | None) -> Tensor:
    if w3_FD is None:
        return F.gelu(w1_FD @ x_D, approximate="tanh") @ w2_FD
    return (F.silu(w1_FD @ x_D) * (w3_FD @ x_D)) @ w2_FD


def moe(x_TD: Tensor, row_T: Tensor, rows: int, state: dict[str, Tensor], config: MoEConfig,
        jitter_TD: Tensor | None = None) -> dict[str, Tensor]:
    """y_TD, balance_sum, z_sum, entropy_sum, counts_E and expert_index_Tk of the layer whose state is given.

    jitter_TD: factors on the router's input.
    """
    outputs, chosen, probabilities = [], [], []
    z_sum = entropy_sum = x_TD.new_zeros(())
    for t, x_D in enumerate(x_TD):
        logits_E = state["router.weight"] @ (x_D if jitter_TD is None else x_D * jitter_TD[t])
        probability_E = logits_E.exp() / logits_E.exp().sum()
        best = sorted(range(config.experts), key=lambda e: -probability_E[e].item())[:config.top_k]
        total = sum(probability_E[e] for e in best) if config.normalize else 1.0
        y_D = torch.zeros_like(x_D)
        for e in best:
            own = [state[f"experts.w{i}"][e] if f"experts.w{i}" in state else None for i in (1, 2, 3)]
            y_D = y_D + probability_E[e] / total * expert(x_D, *own)
        if config.shared_ffn:
            y_D = y_D + expert(x_D, *(state[f"shared.w{i}"][0] if config.gated or i < 3 else None for i in (1, 2, 3)))
        outputs.append(y_D)
        chosen.append(best)
        probabilities.append(probability_E)
        z_sum = z_sum + logits_E.exp().sum().log() ** 2
        entropy_sum = entropy_sum - (probability_E * probability_E.log()).sum()

    balance_sum = x_TD.new_zeros(())
    for row in range(rows):
        members = [t for t in range(len(x_TD)) if row_T[t] == row]
        for e in range(config.experts if members else 0):
            count = sum(e in chosen[t] for t in members)
            mean = sum(probabilities[t][e] for t in members) / len(members)
            balance_sum = balance_sum + config.experts / config.top_k * count * mean
    counts_E = torch.tensor([sum(e in best for best in chosen) for e in range(config.experts)])
    return {"y_TD": torch.stack(outputs), "balance_sum": balance_sum, "z_sum": z_sum, "entropy_sum": entropy_sum,
            "counts_E": counts_E, "expert_index_Tk": torch.tensor(chosen)}
