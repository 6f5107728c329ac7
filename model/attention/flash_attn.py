"""GPU backend: the flash-attn package (2.8.3.post2), imported when it is first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from model.attention.segments import SegmentKernel
from model.attention.torch_flash import flash_limits


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    limits = flash_limits(device, dtype, head_dim)
    if limits is not None:
        return limits
    try:
        _interface()
    except ImportError as error:
        return f"flash-attn cannot be imported ({error}); `make gpu` installs it"
    return None


@dataclass(frozen=True)
class FlashAttn(SegmentKernel):
    """`Kernel` over the package's variable-length forward and backward."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        segments = self.segments
        left, right = segments.window or (-1, -1)
        out, lse, *_ = _interface()._wrapped_flash_attn_varlen_forward(
            q, k, v, segments.cu_q_S, segments.cu_k_S, segments.max_q, segments.max_k, 0.0, scale, causal=False,
            window_size_left=left, window_size_right=right)
        return out, lse

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
                 ) -> tuple[Tensor, Tensor, Tensor]:
        segments = self.segments
        left, right = segments.window or (-1, -1)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _interface()._wrapped_flash_attn_varlen_backward(
            dout.contiguous(), q, k, v, out.contiguous(), lse.contiguous(), dq, dk, dv, segments.cu_q_S,
            segments.cu_k_S, segments.max_q, segments.max_k, 0.0, scale, False, left, right, 0.0, None,
            torch.are_deterministic_algorithms_enabled())
        return dq, dk, dv


def _interface() -> ModuleType:
    from flash_attn import flash_attn_interface
    return flash_attn_interface
