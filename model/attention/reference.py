"""Dense attention, segment by segment, in plain PyTorch: any device and dtype, O(n^2) memory. The slow truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.segments import Segments, lse_dtype


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None if dtype.is_floating_point else f"it needs a floating-point dtype, not {dtype}"


def dense_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [..., Q, K] over k, v [..., N, K] where `mask` is True -> out [..., Q, K], lse [..., Q].
    A query without any key gets out 0 and lse -inf."""
    score = _scores(q, k, mask, scale)
    lse = torch.logsumexp(score, dim=-1)
    weight = torch.exp(score - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None])
    return weight.to(v.dtype) @ v, lse


def dense_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None,
                   scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; shapes as in `dense_forward`. `out` and `lse` are those of all keys of the query."""
    weight = torch.exp(_scores(q, k, mask, scale) - lse[..., None])
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
    dscore = (weight * ((dout @ v.mT).to(lse.dtype) - delta) * scale).to(q.dtype)
    return dscore @ k, dscore.mT @ q, weight.to(dout.dtype).mT @ dout


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    score = (q @ k.mT).to(lse_dtype(q.dtype)) * scale
    return score if mask is None else score.masked_fill(~mask, -torch.inf)


@dataclass(frozen=True)
class Reference:
    """`Kernel` out of dense products; the loop is over segments, by (rows of q, rows of k and v)."""

    pieces: tuple[tuple[slice, slice], ...]
    window: tuple[int, int] | None

    @classmethod
    def build(cls, segments: Segments, *, heads: int, head_dim: int, dtype: torch.dtype) -> Reference:
        pieces = zip(*(map(slice, cu.tolist(), cu[1:].tolist()) for cu in (segments.cu_q_S, segments.cu_k_S)),
                     strict=False)
        return cls(tuple(pieces), segments.window)

    def to(self, device: torch.device | str) -> Reference:
        return self

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype(q.dtype))
        for rows, keys in self.pieces:
            q_HQK, k_HNK, v_HNK = (_heads(x) for x in (q[rows], k[keys], v[keys]))
            out_HQK, lse[:, rows] = dense_forward(q_HQK, k_HNK, v_HNK, self._mask(q_HQK), scale)
            out[rows] = _heads(out_HQK)
        return out, lse

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
                 ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for rows, keys in self.pieces:
            dout_HQK, q_HQK, k_HNK, v_HNK, out_HQK = (
                _heads(x) for x in (dout[rows], q[rows], k[keys], v[keys], out[rows]))
            grads = dense_backward(dout_HQK, q_HQK, k_HNK, v_HNK, out_HQK, lse[:, rows], self._mask(q_HQK), scale)
            dq[rows], dk[keys], dv[keys] = map(_heads, grads)
        return dq, dk, dv

    def _mask(self, q_HQK: Tensor) -> Tensor | None:
        if self.window is None:
            return None
        place_Q = torch.arange(q_HQK.shape[1], device=q_HQK.device)
        distance_QN = place_Q[None, :] - place_Q[:, None]
        return (distance_QN >= -self.window[0]) & (distance_QN <= self.window[1])


def _heads(x: Tensor) -> Tensor:
    """[Q, H, K] <-> [H, Q, K]."""
    return x.transpose(0, 1)
