"""How the experts are used: counted on the device without waiting for it, told in each line of metrics, and watched.

Letters: L layers, E experts, B bins, T tokens of a micro-batch, M those of them that are trained, k experts of a token.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from model.diffusion_lm import LossReport

NOISE_BINS = POSITION_BINS = 10
STARVING_SHARE = 0.1
"""An expert starves below this part of an equal share of its layer's tokens ..."""
STARVING_LINES = 10
"""... over this many lines of metrics together."""


class ExpertUse:
    """This rank's counts since it was made; `flat` of all ranks, added up, go to `summary`."""

    def __init__(self, layers: int, experts: int, device: torch.device):
        self.by_position_LBE = torch.zeros(layers, POSITION_BINS, experts, dtype=torch.int64, device=device)
        self.by_noise_LBE = torch.zeros(layers, NOISE_BINS, experts, dtype=torch.int64, device=device)
        self.entropy_L = torch.zeros(layers, dtype=torch.float64, device=device)
        self.tokens_L = torch.zeros_like(self.entropy_L)

    def add(self, report: LossReport, position_bin_T: Tensor, noise_bin_M: Tensor) -> None:
        """One micro-batch. position_bin_T: of all tokens; noise_bin_M: of the trained tokens, the only ones whose
        noise says how hard they are; both int64."""
        for layer, aux in enumerate(report.experts):
            trained_M, bin_T = report.token_M, position_bin_T
            if layer == len(report.experts) - 1 and report.last_N is not None:
                trained_M, bin_T = report.last_M, position_bin_T[report.last_N]
            _count(self.by_position_LBE[layer], bin_T, aux.expert_index_Tk)
            _count(self.by_noise_LBE[layer], noise_bin_M, aux.expert_index_Tk[trained_M])
            self.tokens_L[layer] += len(aux.expert_index_Tk)
        self.entropy_L += torch.stack([aux.entropy_sum for aux in report.experts])

    def flat(self) -> Tensor:
        """Everything as one fp64 vector, which holds counts exactly."""
        return torch.cat([self.by_position_LBE.flatten().double(), self.by_noise_LBE.flatten().double(),
                          self.entropy_L, self.tokens_L])

    def summary(self, flat: Tensor) -> dict:
        """What a line of metrics says, from the sum over ranks of `flat`, on the host."""
        sizes = [part.numel() for part in (self.by_position_LBE, self.by_noise_LBE, self.entropy_L, self.tokens_L)]
        by_position, by_noise, entropy_L, tokens_L = flat.split(sizes)
        by_position_LBE = by_position.view(self.by_position_LBE.shape)
        tokens_LE = by_position_LBE.sum(1)
        variation_L = tokens_LE.std(1, unbiased=False) / tokens_LE.mean(1)
        dead_L = (tokens_LE == 0).sum(1)
        entropy_L = entropy_L / tokens_L
        return {
            "expert_tokens": tokens_LE.long().tolist(),
            "expert_share_by_position": _shares(by_position_LBE),
            "expert_share_by_noise": _shares(by_noise.view(self.by_noise_LBE.shape)),
            "expert_variation_by_layer": variation_L.round(decimals=4).tolist(),
            "expert_variation_worst": float(variation_L.max()),
            "router_entropy_by_layer": entropy_L.round(decimals=4).tolist(),
            "router_entropy": float(entropy_L.mean()),
            "dead_experts_by_layer": dead_L.tolist(),
            "dead_experts": int(dead_L.sum()),
        }


def _count(counts_BE: Tensor, bin_N: Tensor, index_Nk: Tensor) -> None:
    """Adds one for every expert of every token. Not bincount: it waits for a GPU to learn the length of its output."""
    cell = (bin_N[:, None] * counts_BE.shape[1] + index_Nk).flatten()
    counts_BE.view(-1).scatter_add_(0, cell, torch.ones_like(cell))


def _shares(counts: Tensor) -> list:
    """Counts over experts (the last dimension) as rounded shares; zeros where nothing was counted."""
    return (counts / counts.sum(-1, keepdim=True).clamp_min(1)).round(decimals=4).tolist()


class StarvationWatch:
    """Notices experts whose tokens, over the last STARVING_LINES lines of metrics together, are fewer than
    STARVING_SHARE of an equal share of their layer's. Such an expert hardly learns, and its layer is smaller than it
    seems. Each is told once, and again if it has recovered in between."""

    def __init__(self) -> None:
        self.lines: deque[list[list[int]]] = deque(maxlen=STARVING_LINES)
        self.told: set[tuple[int, int]] = set()

    def notice(self, tokens_LE: list[list[int]]) -> list[tuple[int, int]]:
        """(layer, expert) of those that starve now and were not told. tokens_LE: of one more line of metrics."""
        self.lines.append(tokens_LE)
        if len(self.lines) < STARVING_LINES:
            return []
        total_LE = torch.tensor(list(self.lines)).sum(0)
        equal_L1 = total_LE.double().mean(1, keepdim=True)
        starving = {(layer, expert) for layer, expert in (total_LE < STARVING_SHARE * equal_L1).nonzero().tolist()}
        new = sorted(starving - self.told)
        self.told = starving
        return new


def warning(starving: list[tuple[int, int]]) -> str:
    """One line for the log that says who starves, what that means and what to do."""
    named = [f"expert {expert} of layer {layer}" for layer, expert in starving[:4]]
    if len(starving) > len(named):
        named.append(f"{len(starving) - len(named)} more")
    return (f"warning: {', '.join(named)} got less than {STARVING_SHARE:.0%} of an equal share of the tokens over the "
            f"last {STARVING_LINES} lines of metrics and hardly learn: raise model.moe.balance_weight, or lower "
            "model.moe.experts")
