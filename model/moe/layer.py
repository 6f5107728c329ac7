"""Dropless mixture of experts: route, sort by expert, multiply, gather back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import MoEConfig
from model.moe.experts import Experts
from model.moe.router import MoEAux, Router

_SHARED_NUMBER = -2
"""The shared expert's place in the numbering of initial weights; the routed experts count from 0."""


class MoELayer(nn.Module):
    """Feed-forward of width D = `width` with `config.experts` experts, of which each token passes `config.top_k`,
    and one more that all tokens pass if `config.shared_ffn` is not 0.

    State: `router.weight` [E, D]; `experts.w1`, `.w2`, `.w3` [E, F, D]; `shared.w1`, `.w2`, `.w3`
    [1, F_shared, D]. The weights are not initialised: call `init_weights` or load a state.
    """

    def __init__(self, width: int, config: MoEConfig):
        super().__init__()
        self.router = Router(width, config.experts, config.top_k, normalize=config.normalize,
                             jitter=config.jitter)
        self.experts = Experts(config.experts, width, config.ffn, gated=config.gated, backend=config.backend)
        self.shared = None
        if config.shared_ffn:
            self.shared = Experts(1, width, config.shared_ffn, gated=config.gated, backend=config.backend)

    def init_weights(self, seed: int, layer_index: int) -> None:
        """Draws all weights from (seed, layer_index) alone; each expert's from its own number besides."""
        self.router.init_weights(seed, layer_index)
        self.experts.init_weights(seed, layer_index)
        if self.shared is not None:
            self.shared.init_weights(seed, layer_index, first=_SHARED_NUMBER)

    def forward(self, x_TD: Tensor, row_T: Tensor, rows: int,
                jitter_noise_TD: Tensor | None = None) -> tuple[Tensor, MoEAux]:
        """x_TD: tokens of `rows` packed rows, in any order; T may be 0. row_T: int64, each token's row in
        [0, rows). jitter_noise_TD: uniform in [0, 1), stretched to the factors [1 - jitter, 1 + jitter] on
        the router's input; needed while training if jitter is not 0 (ConfigError), unused otherwise.

        Returns y_TD in x's dtype, and the layer's losses and statistics.
        """
        weight_Tk, aux = self.router(x_TD, row_T, rows, jitter_noise_TD)
        dispatch = self.experts.dispatch(x_TD.device)
        order = dispatch.sort_by_expert(aux.expert_index_Tk)
        y_ND = self.experts(dispatch.scatter_to_experts(x_TD, order), aux.counts_E)
        y_TD = dispatch.gather_from_experts(y_ND, weight_Tk, order)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD, torch.full((1,), len(x_TD), device=x_TD.device))
        return y_TD, aux
