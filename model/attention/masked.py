"""Segments with a mask of their own, for the backends whose kernels cannot take one: plain PyTorch, on any device.

Used for global keys scattered over their stream: few keys for each segment, so queries go in padded blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention.reference import dense_backward, dense_forward
from model.attention.segments import Segments, lse_dtype
from model.transfer import sent

BLOCK = 64


@dataclass(frozen=True)
class MaskedBlocks:
    """`Kernel` over padded blocks of queries.

    query_BC: the query in each place of a block (0 where it is padding). slot_Q: each query's place, b * C + c.
    key_BG: the keys of each block's segment (0 where padding). mask_HBCG: True where a pair counts; H may be 1.
    """

    query_BC: Tensor
    slot_Q: Tensor
    key_BG: Tensor
    mask_HBCG: Tensor

    @classmethod
    def build(cls, segments: Segments) -> MaskedBlocks:
        query_BC, slot_Q, key_BG, mask_HBCG, blocks = [], [], [], [], 0
        bounds = zip(segments.cu_q_S.tolist(), segments.cu_k_S.tolist(), segments.masks_S, strict=False)
        for q_start, k_start, mask_HQN in bounds:
            _, queries, keys = mask_HQN.shape
            padding = -queries % BLOCK
            place_Q = torch.arange(queries)
            slot_Q.append(place_Q + blocks * BLOCK)
            query_BC.append(F.pad(place_Q + q_start, (0, padding)).view(-1, BLOCK))
            key_G = F.pad(torch.arange(keys) + k_start, (0, segments.max_k - keys))
            key_BG.append(key_G.expand(len(query_BC[-1]), -1))
            mask_HQG = F.pad(mask_HQN, (0, segments.max_k - keys, 0, padding))
            mask_HBCG.append(mask_HQG.unflatten(1, (-1, BLOCK)))
            blocks += len(query_BC[-1])
        return cls(torch.cat(query_BC), torch.cat(slot_Q), torch.cat(key_BG), torch.cat(mask_HBCG, dim=1))

    def to(self, device: torch.device | str) -> MaskedBlocks:
        return MaskedBlocks(*(sent(x, device) for x in (self.query_BC, self.slot_Q, self.key_BG, self.mask_HBCG)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        q_HBCK, k_HBGK, v_HBGK = self._queries(q), self._keys(k), self._keys(v)
        out_HBCK, lse_HBC = dense_forward(q_HBCK, k_HBGK, v_HBGK, self.mask_HBCG, scale)
        return self._rows(out_HBCK), lse_HBC.flatten(1)[:, self.slot_Q]

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
                 ) -> tuple[Tensor, Tensor, Tensor]:
        dq_HBCK, dk_HBGK, dv_HBGK = dense_backward(
            self._queries(dout), self._queries(q), self._keys(k), self._keys(v), self._queries(out),
            lse[:, self.query_BC], self.mask_HBCG, scale)
        return self._rows(dq_HBCK), self._sum_keys(dk_HBGK, k), self._sum_keys(dv_HBGK, v)

    def _queries(self, x: Tensor) -> Tensor:
        """[Q, H, K] -> [H, B, C, K], contiguous as products over (H, B) want it."""
        return x.transpose(0, 1)[:, self.query_BC]

    def _keys(self, x: Tensor) -> Tensor:
        """[N, H, K] -> [H, B, G, K]."""
        return x.transpose(0, 1)[:, self.key_BG]

    def _rows(self, x_HBCK: Tensor) -> Tensor:
        """[H, B, C, K] -> [Q, H, K]."""
        return x_HBCK.flatten(1, 2)[:, self.slot_Q].transpose(0, 1)

    def _sum_keys(self, x_HBGK: Tensor, like: Tensor) -> Tensor:
        """[H, B, G, K] -> [N, H, K], in fp32 at least: a key has a term of every block of its document."""
        dtype = lse_dtype(like.dtype)
        total = torch.zeros(like.shape, dtype=dtype, device=like.device)
        return total.index_add_(0, self.key_BG.flatten(), x_HBGK.permute(1, 2, 0, 3).flatten(0, 1).to(dtype))
