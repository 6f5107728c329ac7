"""CPU backend: the segments become tiles, batches of equal blocks, for PyTorch's CPU flash attention.

A windowed segment much longer than its window is cut into blocks of queries, each of which reads its own keys and
the window's reach on both sides through an overlapping view; neighbouring short ones share blocks, and a mask keeps
segments and window apart. Other segments are one block each. The operations used return and accept the log of the
sum of exponentiated scores, which `F.scaled_dot_product_attention` does not; a test pins their schemas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention.segments import Segments, lse_dtype

TILE_BYTES = 1 << 19
"""Size of a tile's queries: the working memory of a call stays in the cache and off the page-fault path."""


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cpu":
        return f"the model is on device '{device.type}' and these kernels run on the CPU only"
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"the dtype is {dtype}; float32, float64, bfloat16 and float16 work"
    return None


@dataclass(frozen=True)
class Tile:
    """Block b of `blocks`: `queries` rows from q_start + b * queries see `keys` rows from k_start + b * step.

    Keys may lie outside the rows there are (`mask` hides them). mask: additive, 0 or -inf,
    [1 or blocks, 1 or H, queries, keys], or None where every key is seen. unseeing: True for queries whose keys are
    all hidden, shaped as the mask without its last dimension, or None where there are none.
    """

    q_start: int
    k_start: int
    blocks: int
    queries: int
    keys: int
    step: int
    mask: Tensor | None = None
    unseeing: Tensor | None = None

    @property
    def q_rows(self) -> slice:
        return slice(self.q_start, self.q_start + self.blocks * self.queries)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """out of the tile's rows, [rows, H, K], and their lse, [H, rows]."""
        out_BHQK, lse_BHQ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            self.q_blocks(q), self.k_blocks(k), self.k_blocks(v), attn_mask=self.mask, scale=scale)
        if self.unseeing is not None:
            lse_BHQ = lse_BHQ.masked_fill(self.unseeing, -torch.inf)
        return _rows(out_BHQK), lse_BHQ.transpose(0, 1).flatten(1)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
                 ) -> tuple[Tensor, Tensor, Tensor]:
        """dq of the tile's rows, [rows, H, K]; dk and dv of each block, [blocks, H, keys, K]."""
        lse_BHQ = lse[:, self.q_rows].unflatten(1, (self.blocks, self.queries)).transpose(0, 1)
        dq_BHQK, dk_BHNK, dv_BHNK = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            self.q_blocks(dout), self.q_blocks(q), self.k_blocks(k), self.k_blocks(v), self.q_blocks(out), lse_BHQ,
            0.0, False, attn_mask=self.mask, scale=scale)
        return _rows(dq_BHQK), dk_BHNK, dv_BHNK

    def q_blocks(self, x: Tensor) -> Tensor:
        """[Q, H, K] -> view [blocks, H, queries, K]."""
        return x[self.q_rows].unflatten(0, (self.blocks, self.queries)).transpose(1, 2)

    def k_blocks(self, x: Tensor) -> Tensor:
        """[N, H, K] -> [blocks, H, keys, K], overlapping where step < keys; rows outside [0, N) are zero."""
        stop = self.k_start + (self.blocks - 1) * self.step + self.keys
        before, after = max(-self.k_start, 0), max(stop - x.shape[0], 0)
        rows = x[self.k_start + before:stop - after]
        if before or after:
            rows = F.pad(rows, (0, 0, 0, 0, before, after))
        return rows.unfold(0, self.keys, self.step).transpose(2, 3)

    def add_k_blocks(self, total: Tensor, blocks: Tensor, offset: int) -> None:
        """Adds [blocks, H, keys, K] to the rows they were read from; `total` has `offset` rows before row 0."""
        width, heads, size = total.stride(0), blocks.shape[1], blocks.shape[3]
        for first in range(0, self.keys, self.step):
            count = min(self.step, self.keys - first)
            shape, strides = (self.blocks, heads, count, size), (self.step * width, size, width, 1)
            rows = total.as_strided(shape, strides, (self.k_start + offset + first) * width)
            rows += blocks[:, :, first:first + count]


@dataclass(frozen=True)
class CpuBand:
    """`Kernel` over tiles. reach: how far tiles may read before the first and behind the last row."""

    tiles: tuple[Tile, ...]
    reach: tuple[int, int] = (0, 0)

    @classmethod
    def build(cls, segments: Segments, *, heads: int, head_dim: int, dtype: torch.dtype) -> CpuBand:
        limit = max(TILE_BYTES // (heads * head_dim * dtype.itemsize), 1)
        if segments.masks_S is not None:
            return cls(tuple(_masked_tiles(segments, dtype)))
        if segments.window is None:
            return cls(tuple(_dense_tiles(segments, limit)))
        left, right = (min(side, segments.max_q - 1) for side in segments.window)
        block = min(max((left + right) // 8, 64), 128)
        tiles = _windowed_tiles(replace(segments, window=(left, right)), block, limit, dtype)
        return cls(tuple(tiles), (left, right))

    def to(self, device: torch.device | str) -> CpuBand:
        return self

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if len(self.tiles) == 1:
            return self.tiles[0].forward(q, k, v, scale)
        out, lse = torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype(q.dtype))
        for tile in self.tiles:
            out[tile.q_rows], lse[:, tile.q_rows] = tile.forward(q, k, v, scale)
        return out, lse

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
                 ) -> tuple[Tensor, Tensor, Tensor]:
        if len(self.tiles) == 1 and self.tiles[0].keys == self.tiles[0].step:
            dq, dk_BHNK, dv_BHNK = self.tiles[0].backward(dout, q, k, v, out, lse, scale)
            return dq, _rows(dk_BHNK), _rows(dv_BHNK)
        before, after = self.reach
        dq = torch.empty_like(q)
        dk, dv = (x.new_zeros((before + len(x) + after, *x.shape[1:])) for x in (k, v))
        for tile in self.tiles:
            dq[tile.q_rows], dk_BHNK, dv_BHNK = tile.backward(dout, q, k, v, out, lse, scale)
            tile.add_k_blocks(dk, dk_BHNK, before)
            tile.add_k_blocks(dv, dv_BHNK, before)
        return dq, dk[before:before + len(k)], dv[before:before + len(v)]


def _rows(x_BHNK: Tensor) -> Tensor:
    """[B, H, N, K] -> [B * N, H, K], a view of what the operations return."""
    return x_BHNK.transpose(1, 2).flatten(0, 1)


def _masked_tiles(segments: Segments, dtype: torch.dtype) -> Iterator[Tile]:
    """Segments with masks of their own: a tile each."""
    bounds = zip(segments.cu_q_S.tolist(), segments.cu_k_S.tolist(), segments.masks_S, strict=False)
    for q_start, k_start, mask_HQN in bounds:
        _, queries, keys = mask_HQN.shape
        mask = _additive(mask_HQN[None], dtype)
        yield Tile(q_start, k_start, 1, queries, keys, keys, mask, ~mask_HQN.any(-1)[None])


def _dense_tiles(segments: Segments, limit: int) -> Iterator[Tile]:
    """Segments without a window: neighbours of one shape share a tile."""
    shapes = zip(segments.cu_q_S.diff().tolist(), segments.cu_k_S.diff().tolist(), strict=True)
    q_start = k_start = 0
    for (queries, keys), group in groupby(shapes):
        for blocks in _split(len(list(group)), limit // queries):
            yield Tile(q_start, k_start, blocks, queries, keys, keys)
            q_start, k_start = q_start + blocks * queries, k_start + blocks * keys


def _windowed_tiles(segments: Segments, block: int, limit: int, dtype: torch.dtype) -> Iterator[Tile]:
    """Segments that are not longer than what a block would read anyway are dense, if there are enough rows of one
    length for a call of their own; all between them is cut into blocks."""
    left, right = segments.window
    start = band_start = 0
    owner_N = torch.repeat_interleave(segments.cu_q_S.diff())
    for length, group in groupby(segments.cu_q_S.diff().tolist()):
        count = len(list(group))
        if length <= block + left + right and length * count >= block // 2:
            yield from _band_tiles(owner_N, band_start, start, segments.window, block, limit, dtype)
            mask = None
            if length - 1 > min(left, right):
                mask = _additive(_band(length, length, 0, segments.window)[None, None], dtype)
            for blocks in _split(count, limit // length):
                yield Tile(start, start, blocks, length, length, length, mask)
                start += blocks * length
            band_start = start
        else:
            start += length * count
    yield from _band_tiles(owner_N, band_start, start, segments.window, block, limit, dtype)


def _band_tiles(owner_N: Tensor, start: int, stop: int, window: tuple[int, int], block: int, limit: int,
                dtype: torch.dtype) -> Iterator[Tile]:
    """Blocks of `block` queries over the rows start .. stop, and one shorter block for the rest. Long runs of blocks
    whose keys all lie in one segment have one mask between them."""
    left, right = window
    owners = F.pad(owner_N, (left, right), value=-1)  # owner of row n at n + left

    def tile(blocks: int, queries: int, shared_mask: Tensor | None) -> Tile:
        keys, end = left + queries + right, start + blocks * queries
        mask = shared_mask
        if mask is None:
            key_owner_BN = owners[start:end + left + right].unfold(0, keys, queries)
            same_BQN = owner_N[start:end].view(blocks, queries, 1) == key_owner_BN[:, None]
            mask = _additive((same_BQN & _band(queries, keys, left, window))[:, None], dtype)
        return Tile(start, start - left, blocks, queries, keys, queries, mask)

    keys, rows = left + block + right, (stop - start) // block * block
    first_B, last_B = (owners[row:row + rows:block] for row in (start, start + keys - 1))
    band = _additive(_band(block, keys, left, window)[None, None], dtype)
    most = max(limit // block, 1)
    for within, count in _runs(((first_B >= 0) & (first_B == last_B)).tolist(), most // 2):
        for blocks in _split(count, most):
            yield tile(blocks, block, band if within else None)
            start += blocks * block
    if start < stop:
        yield tile(1, stop - start, None)


def _runs(flags: list[bool], shortest: int) -> Iterator[tuple[bool, int]]:
    """Lengths of the runs of equal flags, where runs of True below `shortest` count as False."""
    runs = [(flag, len(list(group))) for flag, group in groupby(flags)]
    for flag, group in groupby(runs, lambda run: run[0] and run[1] >= shortest):
        yield flag, sum(count for _, count in group)


def _band(queries: int, keys: int, left: int, window: tuple[int, int]) -> Tensor:
    """Bool [queries, keys]: the window around query i, whose own key is i + left."""
    distance = torch.arange(keys)[None, :] - left - torch.arange(queries)[:, None]
    return (distance >= -window[0]) & (distance <= window[1])


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _split(count: int, limit: int) -> Iterator[int]:
    """`count` in pieces of at most `limit` (at least 1)."""
    limit = max(limit, 1)
    while count > 0:
        yield min(count, limit)
        count -= limit
