"""The experts' weights, stacked, in the memory layout of MegaBlocks ([E * F, D] when flattened)."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from model.keyed_random import keyed_generator
from model.moe.backends import BACKENDS, choose_backend, dispatch_of


class Experts(nn.Module):
    """`count` feed-forward networks of hidden width F = `ffn`, applied to tokens sorted by expert.

    Parameters `w1`, `w2`, `w3`, each [E, F, D]. Gated: y = (silu(x w1^T) * (x w3^T)) w2; otherwise
    y = gelu(x w1^T) w2 and `w3` is None. They are not initialised: call `init_weights` or load a state.
    """

    def __init__(self, count: int, width: int, ffn: int, *, gated: bool = True, backend: str = "auto"):
        super().__init__()
        self.width, self.ffn, self.backend = width, ffn, backend
        self.w1 = nn.Parameter(torch.empty(count, ffn, width))
        self.w2 = nn.Parameter(torch.empty(count, ffn, width))
        self.w3 = nn.Parameter(torch.empty(count, ffn, width)) if gated else None

    @torch.no_grad()
    def init_weights(self, seed: int, layer_index: int, first: int = 0) -> None:
        """Normal weights that keep the variance (std = 1 / sqrt(inputs)).

        Expert e is drawn from (seed, layer_index, first + e) alone, so that a process that holds the experts
        [first, first + E) draws what one that holds all of them does.
        """
        count, ffn, width = self.w1.shape
        for e in range(count):
            generator = keyed_generator(seed, layer_index, first + e)
            for weight_EFD, inputs in ((self.w1, width), (self.w2, ffn), (self.w3, width)):
                if weight_EFD is not None:
                    weight_EFD[e].copy_(torch.randn(ffn, width, generator=generator) * inputs ** -0.5)

    def chosen(self, device: torch.device) -> str:
        """The backend that multiplies on `device`; a key of BACKENDS."""
        return choose_backend(self.backend, device, self.w1.dtype, self.width, self.ffn)[0]

    def dispatch(self, device: torch.device) -> ModuleType:
        """What sorts, scatters and gathers the tokens; see `model/moe/dispatch.py`."""
        return dispatch_of(self.chosen(device))

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """x_ND: tokens sorted by expert; counts_E: integer, how many of each. Returns y_ND in x's dtype."""
        if not len(x_ND):
            return _NoTokens.apply(x_ND, *self.parameters())
        return BACKENDS[self.chosen(x_ND.device)].run(x_ND.to(self.w1.dtype), counts_E, self).to(x_ND.dtype)


class _NoTokens(torch.autograd.Function):
    """What a rank does whose experts got no token, since grouped products refuse to be asked for nothing. The weights,
    saved themselves and not as views that ZeRO-3 could not free, have a gradient of zeros."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_0D: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*weights)
        return x_0D.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, grad_0D: Tensor) -> tuple[Tensor, ...]:
        return grad_0D, *(torch.zeros_like(weight) for weight in ctx.saved_tensors)
