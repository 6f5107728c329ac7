"""GPU backend: the FlashAttention-2 kernels inside PyTorch. Nothing to install; a test pins the private operations'
schemas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.segments import SegmentKernel


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return flash_limits(device, dtype, head_dim)


def flash_limits(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no FlashAttention-2 kernel can run here, or None."""
    if device.type != "cuda":
        return f"FlashAttention-2 has no kernels for a {device.type} device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the dtype is {dtype}; FlashAttention-2 has bfloat16 and float16 only"
    if head_dim % 8 or head_dim > 256:
        return f"the head width is {head_dim}; FlashAttention-2 takes multiples of 8 up to 256"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


@dataclass(frozen=True)
class TorchFlash(SegmentKernel):
    """`Kernel` over `aten::_flash_attention_forward` and `_backward`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        segments = self.segments
        left, right = segments.window or (-1, -1)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, segments.cu_q_S, segments.cu_k_S, segments.max_q, segments.max_k, 0.0, False, False,
            scale=scale, window_size_left=left, window_size_right=right)
        return out, lse

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
                 ) -> tuple[Tensor, Tensor, Tensor]:
        segments = self.segments
        left, right = segments.window or (-1, -1)
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            dout.contiguous(), q, k, v, out.contiguous(), lse.contiguous(), segments.cu_q_S, segments.cu_k_S,
            segments.max_q, segments.max_k, 0.0, False, no_dropout, no_dropout.new_empty(0),
            scale=scale, window_size_left=left, window_size_right=right)
