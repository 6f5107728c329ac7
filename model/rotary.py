"""Rotary positions, and the way of queries and keys from their projection to attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def rotary_tables(position_T: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin [T, head_dim / 2] in fp32 of RoPE (Su et al. 2021, arXiv 2104.09864)."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=position_T.device, dtype=torch.float32) / head_dim)
    angle = position_T[:, None].float() * frequency
    return angle.cos(), angle.sin()


def rotated_heads(x_TPHK: Tensor, gain_GK: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The P parts [T, H, K] of a joint projection (queries, keys, values, or only some of them): the first G
    normalised (RMSNorm, Zhang & Sennrich 2019), times their gains, and rotated by the tables, which pair channel i with
    channel i + K / 2; the others as they are.

    One operation, written out, because on memory it is gone over a third as often as by its parts, and keeps nothing
    but the projection for the backward pass.
    """
    return _RotatedHeads.apply(x_TPHK, gain_GK, *rotary)


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, gain_GK: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        wide, count = torch.promote_types(x.dtype, torch.float32), len(gain_GK)
        norm_TGH1 = torch.linalg.vector_norm(x[:, :count], dim=-1, keepdim=True, dtype=wide)
        scale_TGH1 = (norm_TGH1.square() / x.shape[-1] + torch.finfo(wide).eps).rsqrt()
        rotated = []
        for part, gain_K in enumerate(gain_GK):
            out_THK = torch.empty_like(x[:, part], memory_format=torch.contiguous_format)
            _rotate(x[:, part], cos, sin, gain_K, out_THK)
            rotated.append(out_THK.mul_(scale_TGH1[:, part]))
        ctx.save_for_backward(x, gain_GK, cos, sin, scale_TGH1)
        return *rotated, *(x[:, part] for part in range(count, x.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain_GK, cos, sin, scale_TGH1 = ctx.saved_tensors
        head_dim = x.shape[-1]
        dx, dgain_GK = torch.empty_like(x), torch.empty_like(gain_GK)
        for part in range(len(gain_GK), x.shape[1]):
            dx[:, part] = grads[part]
        for part, gain_K in enumerate(gain_GK):
            x_THK, scale_TH1 = x[:, part], scale_TGH1[:, part]
            back_THK = torch.empty_like(x_THK, memory_format=torch.contiguous_format)
            _rotate(grads[part], cos, -sin, torch.ones_like(gain_K), back_THK)
            # y = g s x with s = (mean(x^2) + eps)^(-1/2): dx = s g dy - x s^3 mean(x g dy), dg = sum(s x dy).
            product_THK = x_THK * back_THK
            dgain_GK[part] = product_THK.view(-1, head_dim).T @ scale_TH1.reshape(-1).to(x.dtype)
            pull_TH1 = (product_THK @ gain_K)[..., None] * (scale_TH1**3 / -head_dim)
            torch.mul(back_THK.mul_(gain_K), scale_TH1, out=dx[:, part])
            dx[:, part].addcmul_(x_THK, pull_TH1.to(x.dtype))
        return dx, dgain_GK, None, None


def _rotate(x_THK: Tensor, cos: Tensor, sin: Tensor, gain_K: Tensor, out_THK: Tensor) -> None:
    """Writes the rotation of gain * x: each pair (a, b) becomes (a cos - b sin, b cos + a sin)."""
    half = x_THK.shape[-1] // 2
    cos_T1K, sin_T1K = ((gain_K * torch.cat((table, table), -1)).to(x_THK.dtype)[:, None] for table in (cos, sin))
    torch.mul(x_THK, cos_T1K, out=out_THK)
    out_THK[..., :half].addcmul_(x_THK[..., half:], sin_T1K[..., half:], value=-1)
    out_THK[..., half:].addcmul_(x_THK[..., :half], sin_T1K[..., :half])
