"""The small parts of the denoiser: noise-level embedding, modulation, neighbour gathering, dropout."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


class NoiseLevelEmbedding(nn.Module):
    """log-SNR of each noised copy [C] -> [C, dim]: sinusoids, then a two-layer network."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.net = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, log_snr_C: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.dim // 2
        frequency = torch.exp(torch.linspace(math.log(0.1), math.log(30.0), half, device=log_snr_C.device))
        angle = log_snr_C[:, None].float() * frequency
        features = torch.cat((angle.sin(), angle.cos()), dim=-1)
        return self.net(features.to(dtype))


class ModulatedNorm(nn.Module):
    """LayerNorm whose scale and shift depend on the noise level (adaLN of DiT, Peebles & Xie 2022).

    The modulation starts at zero, so that every layer starts as a plain LayerNorm.
    """

    def __init__(self, width: int, condition_dim: int):
        super().__init__()
        self.width = width
        self.modulation = nn.Linear(condition_dim, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x_TD: Tensor, condition_CD: Tensor, condition_T: Tensor) -> Tensor:
        """condition_T says which row of condition_CD belongs to each token."""
        scale_CD, shift_CD = self.modulation(nn.functional.silu(condition_CD)).chunk(2, -1)
        return _Modulate.apply(nn.functional.layer_norm(x_TD, (self.width,)), 1 + scale_CD, shift_CD, condition_T)


class _Modulate(torch.autograd.Function):
    """x_TD * scale_CD[condition_T] + shift_CD[condition_T]. Written out because autograd would keep the scale of every
    token, and go over memory twice as often."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, scale_CD: Tensor, shift_CD: Tensor, condition_T: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, scale_CD, condition_T)
        return shift_CD.index_select(0, condition_T).addcmul_(x_TD, scale_CD.index_select(0, condition_T))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, scale_CD, condition_T = ctx.saved_tensors
        # A product adds up in fp32, in one order; rows of bf16 added one by one stand still after some hundred tokens.
        is_of_CT = (torch.arange(len(scale_CD), device=grad_TD.device)[:, None] == condition_T).to(grad_TD.dtype)
        dscale_CD, dshift_CD = is_of_CT @ (grad_TD * x_TD), is_of_CT @ grad_TD
        return scale_CD.index_select(0, condition_T).mul_(grad_TD), dscale_CD, dshift_CD, None


def neighbour_index(document_T: Tensor, side_T: Tensor, draw_T: Tensor, width: int) -> Tensor:
    """For each token its `width` nearest packed neighbours [T, width], in order; T where there is none.

    Neighbours are of the same document, side and draw, so that nothing leaks where segments meet that do not see
    each other.
    """
    count = document_T.numel()
    at = torch.arange(count)[:, None] + torch.arange(width) - width // 2
    inside = (at >= 0) & (at < count)
    near = at.clamp(0, max(count - 1, 0))
    same = inside
    for key_T in (document_T, side_T, draw_T):
        same = same & (key_T[near] == key_T[:, None])
    return torch.where(same, near, count)


def gather_neighbours(x_TE: Tensor, neighbour_TW: Tensor) -> Tensor:
    """[T, E] -> [T, W * E]: each token's neighbours side by side, zeros where there is none."""
    padded = torch.cat((x_TE, x_TE.new_zeros(1, x_TE.shape[1])))
    return padded[neighbour_TW].flatten(1)


def keyed_dropout(x_TD: Tensor, key_T: Tensor | None, site: int, rate: float) -> Tensor:
    """Sets each number to zero with probability `rate` and scales the rest to keep the mean.

    What is dropped follows from the token's int64 key, the site (which of the network's dropouts this is) and the
    channel alone, by SplitMix64's finalizer (Steele et al. 2014): the same on every rank, in any packing, and when
    the activations are computed again. key_T = None, or rate = 0: nothing is dropped.
    """
    if key_T is None or rate == 0:
        return x_TD
    kept_TD = torch.empty(x_TD.shape, dtype=torch.bool, device=x_TD.device)
    for kept, bits in _with_bits(kept_TD, key_T + site):
        torch.ge(bits, int(rate * 2 ** 64) - 2 ** 63, out=kept)
    return torch.where(kept_TD, x_TD / (1 - rate), 0)


def keyed_uniform(key_T: Tensor, width: int) -> Tensor:
    """Numbers [T, width] in fp32, uniform in [0, 1), that follow from a token's key and the channel as in
    `keyed_dropout`."""
    uniform_TD = torch.empty(len(key_T), width, device=key_T.device)
    for uniform, bits in _with_bits(uniform_TD, key_T):
        uniform.copy_((bits >> 40) & (2 ** 24 - 1)).mul_(2 ** -24)
    return uniform_TD


_CACHED = 1 << 18
"""Numbers whose bits are worked out at a time on a CPU, in its cache: eight bytes each, against one that is kept."""
_GOLDEN = 0x9E3779B97F4A7C15 - 2 ** 64  # SplitMix64's constants as signed numbers; products wrap around
_MIX_1 = 0xBF58476D1CE4E5B9 - 2 ** 64
_MIX_2 = 0x94D049BB133111EB - 2 ** 64


def _with_bits(out_TD: Tensor, key_T: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of `out_TD`, each with 64 random bits for every number in it."""
    channel_D = _GOLDEN * torch.arange(1, out_TD.shape[1] + 1, device=out_TD.device)
    rows = max(1, _CACHED // out_TD.shape[1] if out_TD.device.type == "cpu" else len(out_TD))
    for out, key in zip(out_TD.split(rows), _mix(key_T).split(rows), strict=True):
        yield out, _mix(key[:, None] + channel_D)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64; its shifts are logical, so the sign's copies are masked away."""
    x = (x ^ ((x >> 30) & (2 ** 34 - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & (2 ** 37 - 1))) * _MIX_2
    return x ^ ((x >> 31) & (2 ** 33 - 1))
