"""The router: which experts a token goes to, with which weight, and what the choice costs.

Softmax over all experts, then top-k (MegaBlocks' and Mixtral's order), in at least fp32 whatever the model's
precision.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.errors import ConfigError
from model.keyed_random import keyed_generator

_INITIAL_STD = 0.02
_INITIAL_KEY = -1
"""In the place where the experts have their number, from 0."""


class MoEAux(NamedTuple):
    """What a layer reports of its T tokens. All but the indices may be summed over micro-batches and ranks;
    divide by the tokens summed.

    balance_sum: 0-d, differentiable. Load-balancing loss (Switch Transformer's; MegaBlocks' with weight 1; an
        even load gives 1 per token), worked out in each packed row by itself and weighted by the row's tokens, so
        that it does not depend on which rows share a micro-batch or a rank.
    z_sum: 0-d, differentiable: logsumexp(logits)^2 (ST-MoE).
    entropy_sum: 0-d, no gradient, nats: entropy of the router's distribution.
    counts_E: int64: assignments to each expert; they sum to T * k.
    expert_index_Tk: int64: each token's experts, best first.
    """

    balance_sum: Tensor
    z_sum: Tensor
    entropy_sum: Tensor
    counts_E: Tensor
    expert_index_Tk: Tensor


class Router(nn.Module):
    """`weight` [E, D]. With `normalize` the chosen experts' weights are divided by their sum."""

    def __init__(self, width: int, experts: int, top_k: int, *, normalize: bool, jitter: float):
        super().__init__()
        self.top_k, self.normalize, self.jitter = top_k, normalize, jitter
        self.weight = nn.Parameter(torch.empty(experts, width))

    @torch.no_grad()
    def init_weights(self, seed: int, layer_index: int) -> None:
        """Small normal weights, so that training starts from an almost even load."""
        generator = keyed_generator(seed, layer_index, _INITIAL_KEY)
        self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * _INITIAL_STD)

    def forward(self, x_TD: Tensor, row_T: Tensor, rows: int,
                jitter_noise_TD: Tensor | None = None) -> tuple[Tensor, MoEAux]:
        """Weights of the chosen experts [T, k] and the report. Arguments as in `MoELayer.forward`."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.to(dtype)
            if self.training and self.jitter:
                if jitter_noise_TD is None:
                    raise ConfigError("model.moe.jitter", f"is {self.jitter}, but the layer got no "
                                                          "jitter_noise_TD to train with; pass it, or set 0")
                x_TD = x_TD * (1 - self.jitter + 2 * self.jitter * jitter_noise_TD)
            logits_TE = F.linear(x_TD, self.weight.to(dtype))
        logsumexp_T = logits_TE.logsumexp(-1)
        probability_TE = (logits_TE - logsumexp_T[:, None]).exp()
        weight_Tk, expert_index_Tk = probability_TE.topk(self.top_k, dim=-1)
        if self.normalize:
            weight_Tk = weight_Tk / weight_Tk.sum(-1, keepdim=True)

        counts_RE = _count_by_row(expert_index_Tk, row_T, rows, logits_TE.shape[1])
        with torch.no_grad():
            entropy_sum = (logsumexp_T - (probability_TE * logits_TE).sum(-1)).sum()
        return weight_Tk, MoEAux(_balance_sum(probability_TE, counts_RE, row_T), logsumexp_T.square().sum(),
                                 entropy_sum, counts_RE.sum(0), expert_index_Tk)


def _count_by_row(expert_index_Tk: Tensor, row_T: Tensor, rows: int, experts: int) -> Tensor:
    """int64 [R, E]. Not bincount, which waits for a GPU to learn the length of its output."""
    cell_N = (row_T[:, None] * experts + expert_index_Tk).flatten()
    counts = torch.zeros(rows * experts, dtype=torch.int64, device=cell_N.device)
    return counts.scatter_add_(0, cell_N, torch.ones_like(cell_N)).view(rows, experts)


def _balance_sum(probability_TE: Tensor, counts_RE: Tensor, row_T: Tensor) -> Tensor:
    """Sum over rows r of n_r tokens: n_r * E * sum over e of share_re * mean_re, with share_re the part of the
    row's n_r * k assignments that went to e (a constant) and mean_re e's mean probability over its tokens."""
    experts = counts_RE.shape[1]
    share_RE = counts_RE.to(probability_TE.dtype) / counts_RE.sum(1, keepdim=True)
    return experts * (probability_TE * share_RE.index_select(0, row_T)).sum()
