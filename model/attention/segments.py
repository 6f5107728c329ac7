"""What a kernel is asked to do: variable-length attention over consecutive segments of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from model.transfer import sent


@dataclass(frozen=True)
class Segments:
    """Segment s: queries cu_q_S[s] .. cu_q_S[s + 1] see keys cu_k_S[s] .. cu_k_S[s + 1]; none is empty.

    cu_q_S, cu_k_S: int32 boundaries, the first 0. max_q, max_k: longest segment. window: None, or (left, right)
    keys around the query's own place, for which both boundaries must be the same. masks_S: None, or for each segment
    a bool [1 or H, queries, keys], True for the pairs that count; a query may have none.
    """

    cu_q_S: Tensor
    cu_k_S: Tensor
    max_q: int
    max_k: int
    window: tuple[int, int] | None = None
    masks_S: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, length_q_S: Tensor, length_k_S: Tensor, window: tuple[int, int] | None = None,
           masks_S: tuple[Tensor, ...] | None = None) -> Segments:
        """From the segments' lengths, int64 on the CPU."""
        return cls(_boundaries(length_q_S), _boundaries(length_k_S),
                   int(length_q_S.max()), int(length_k_S.max()), window, masks_S)

    def to(self, device: torch.device | str) -> Segments:
        return replace(self, cu_q_S=sent(self.cu_q_S, device), cu_k_S=sent(self.cu_k_S, device))


class Kernel(Protocol):
    """One part of the pattern, ready to run; every backend provides this contract, for any H.

    forward: q [Q, H, K], k and v [N, H, K] -> out [Q, H, K], and the log of the sum of exponentiated scores,
    [H, Q] in float64 for float64 inputs and in float32 otherwise; 0 and -inf for a query without keys.
    backward: gradients of q, k, v, where `out` and `lse` may be those of a larger set of keys that this part
    belongs to: P = exp(score - lse) and sum(dout * out) are then the larger set's, and its parts' gradients add up.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]: ...

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
                 ) -> tuple[Tensor, Tensor, Tensor]: ...

    def to(self, device: torch.device | str) -> Self: ...


@dataclass(frozen=True)
class SegmentKernel:
    """Base of the kernels that need nothing but the segments."""

    segments: Segments

    @classmethod
    def build(cls, segments: Segments, *, heads: int, head_dim: int, dtype: torch.dtype) -> Self:
        return cls(segments)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.segments.to(device))


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which parts are merged."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _boundaries(length_S: Tensor) -> Tensor:
    return torch.nn.functional.pad(length_S.cumsum(0), (1, 0)).to(torch.int32)
