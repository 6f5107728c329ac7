"""Dense attention, segment by segment, in plain PyTorch: any device and dtype, O(n^2) memory. The slow truth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.segments import SegmentKernel, Segments, lse_dtype


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
class Reference(SegmentKernel):
    """`Kernel` out of dense products; the loop is over segments."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype(q.dtype))
        for rows, keys, mask in _pieces(self.segments):
            out_HQK, lse[:, rows] = dense_forward(_heads(q[rows]), _heads(k[keys]), _heads(v[keys]), mask, scale)
            out[rows] = _heads(out_HQK)
        return out, lse

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
                 ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for rows, keys, mask in _pieces(self.segments):
            grads = dense_backward(_heads(dout[rows]), _heads(q[rows]), _heads(k[keys]), _heads(v[keys]),
                                   _heads(out[rows]), lse[:, rows], mask, scale)
            dq[rows], dk[keys], dv[keys] = map(_heads, grads)
        return dq, dk, dv


def _heads(x: Tensor) -> Tensor:
    """[Q, H, K] <-> [H, Q, K]."""
    return x.transpose(0, 1)


def _pieces(segments: Segments) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """(rows of q, rows of k and v, mask [Q, N] or None) of each segment."""
    bounds_q, bounds_k = segments.cu_q_S.tolist(), segments.cu_k_S.tolist()
    for s in range(len(bounds_q) - 1):
        rows, keys = slice(bounds_q[s], bounds_q[s + 1]), slice(bounds_k[s], bounds_k[s + 1])
        mask = None
        if segments.window is not None:
            place_N = torch.arange(keys.stop - keys.start, device=segments.cu_k_S.device)
            distance_NN = place_N[None, :] - place_N[:, None]
            mask = (distance_NN >= -segments.window[0]) & (distance_NN <= segments.window[1])
        yield rows, keys, mask
