"""The plan: the pattern of one packed batch as disjoint parts, each ready for a kernel.

Tokens that share a window form a *stream*: a document in joint mode; a source, or one draw of a target, in cached
mode. The allowed pairs are then the disjoint union of

1. windows: per dilation, windowed attention along each residue class of each stream. Global tokens that lead their
   stream are left out of it;
2. global queries: they see their whole stream (and replace what parts 1 and 3 gave the scattered ones among them);
3. leading global keys: all other queries of the stream see them;
4. scattered global keys: all other queries see them where the window does not cover them;
5. cached mode: target queries see the source of their document.

A plan is built on the CPU, once per batch and distinct pattern, and is shared by the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from model.attention.backends import build_kernel
from model.attention.pattern import MAX_SCATTERED_GLOBALS, AttentionPattern
from model.attention.segments import Kernel, Segments
from model.batch import TokenLayout
from model.errors import ConfigError
from model.transfer import sent

Rows = slice | Tensor
"""Rows of a tensor: a slice where they are consecutive (a view, no copy), otherwise distinct int64 indices."""


@dataclass(frozen=True)
class Part:
    """One share of the allowed pairs: `kernel` on some rows and heads.

    pairs: number of (query, key, head) that count.
    sets_rows: the output is the first of its queries, or replaces an earlier one; otherwise it is merged.
    sets_keys: the gradients are the first of its keys; otherwise they are added.
    replaced: a later part replaces the output of the queries in the plan's `replaced`, which get no gradient here.
    """

    kernel: Kernel
    heads: slice
    q_rows: Rows
    k_rows: Rows
    pairs: int
    sets_rows: bool = False
    sets_keys: bool = False
    replaced: bool = False

    def to(self, device: torch.device | str) -> Part:
        return replace(self, kernel=self.kernel.to(device), q_rows=_move(self.q_rows, device),
                       k_rows=_move(self.k_rows, device))


@dataclass(frozen=True)
class AttentionPlan:
    """What `sparse_attention` follows, for q of `queries` rows and k, v of `keys` rows.

    replaced: rows of q whose output of the windows the global queries' part replaces, or None.
    """

    parts: tuple[Part, ...]
    queries: int
    keys: int
    heads: int
    scale: float
    replaced: Tensor | None

    @property
    def sets_keys(self) -> bool:
        """Whether the parts that set the gradients of keys do so for all of them."""
        set_here = sum(_count(part.k_rows) * _count(part.heads) for part in self.parts if part.sets_keys)
        return set_here == self.keys * self.heads

    @property
    def pairs(self) -> int:
        """Number of (query, key, head) that are attended; a forward costs 4 * head_dim FLOPs for each."""
        return sum(part.pairs for part in self.parts)

    def to(self, device: torch.device | str) -> AttentionPlan:
        return replace(self, parts=tuple(part.to(device) for part in self.parts),
                       replaced=self.replaced if self.replaced is None else _move(self.replaced, device))


def build_plan(layout: TokenLayout, pattern: AttentionPattern, *, head_dim: int, dtype: torch.dtype, backend: str,
               queries: str = "all") -> AttentionPlan:
    """The plan for q [Q, H, head_dim] and k, v [T, H, head_dim] of `dtype`; `layout` lies on the CPU.

    queries: "all" (Q = T), or "target": q holds the target rows only, in packed order, while k and v hold all
    tokens; cached mode only. backend: a name from `model.attention.backends`. ConfigError where the conditioning or
    the global tokens cannot work; ValueError where the positions of a stream are not consecutive.
    """
    if not pattern.cached and (queries == "target" or bool(layout.draw_T.any())):
        raise ConfigError("model.diffusion.conditioning", "joint sources see their target, so a document has one draw "
                          "and its sources are queries too; use cached for several draws or for cached sources")
    heads = len(pattern.dilations)
    kernel = partial(build_kernel, backend, head_dim=head_dim, dtype=dtype)
    query_T = torch.arange(len(layout)) if queries == "all" else layout.is_target_T.cumsum(0) - 1
    token_N, owner_N = _in_streams(layout, pattern.cached)
    target_N = layout.is_target_T[token_N]
    asking_N = slice(None) if queries == "all" else target_N
    streams = _Streams.of(token_N[asking_N], owner_N[asking_N], query_T, layout.is_global_T)
    everyone_N, scattered_N = torch.ones_like(streams.global_N), streams.global_N & ~streams.leads_N
    whole = _whole(streams, streams.global_N, everyone_N, heads, kernel, sets_rows=True)
    replaced_Q = streams.query_N[scattered_N]
    parts = [replace(part, sets_keys=len(replaced_Q) > 0 or not whole) for part in _windows(streams, pattern, kernel)]
    # All but the leading ones ask, so that their rows are consecutive.
    parts += _whole(streams, ~streams.leads_N, streams.leads_N, heads, kernel, counted_N=~streams.global_N)
    if len(replaced_Q):
        parts = [replace(part, replaced=True) for part in parts]
        parts += [*whole, *_scattered(streams, scattered_N, pattern, kernel)]
    else:
        parts = [*(replace(part, sets_keys=True) for part in whole), *parts]
    if pattern.cached:
        documents = _Streams.of(token_N, layout.document_T[token_N], query_T, layout.is_global_T)
        parts += _whole(documents, target_N, ~target_N, heads, kernel)
    return AttentionPlan(tuple(parts), queries=len(layout) if queries == "all" else int(target_N.sum()),
                         keys=len(layout), heads=heads, scale=1 / math.sqrt(head_dim),
                         replaced=replaced_Q if len(replaced_Q) else None)


@dataclass(frozen=True)
class _Streams:
    """Tokens sorted by stream. Per token: its row of k (token) and of q (query), its stream, its place in it
    (rank), whether it is global and whether it is one of the global tokens that lead its stream."""

    token_N: Tensor
    query_N: Tensor
    stream_N: Tensor
    rank_N: Tensor
    global_N: Tensor
    leads_N: Tensor
    count: int

    @classmethod
    def of(cls, token_N: Tensor, owner_N: Tensor, query_T: Tensor, is_global_T: Tensor) -> _Streams:
        _, stream_N, length_S = torch.unique_consecutive(owner_N, return_inverse=True, return_counts=True)
        rank_N = _ranks(length_S)
        global_N = is_global_T[token_N]
        ordinary_S = torch.full((len(length_S),), len(token_N))
        ordinary_S.scatter_reduce_(0, stream_N, rank_N.masked_fill(global_N, len(token_N)), "amin")
        return cls(token_N, query_T[token_N], stream_N, rank_N, global_N, rank_N < ordinary_S[stream_N],
                   len(length_S))

    def lengths(self, of_N: Tensor) -> Tensor:
        """[S]: how many of the tokens marked in `of_N` each stream has."""
        return torch.bincount(self.stream_N[of_N], minlength=self.count)


def _in_streams(layout: TokenLayout, cached: bool) -> tuple[Tensor, Tensor]:
    """(tokens sorted by document, stream and position; the stream they belong to)."""
    owner_T = layout.document_T
    if cached:
        draw_T = layout.draw_T * layout.is_target_T
        owner_T = (2 * owner_T + layout.is_target_T) * (draw_T.max() + 1) + draw_T
    key_T = owner_T * (layout.position_T.max() + 1) + layout.position_T
    sorted_already = bool((key_T.diff() > 0).all())
    token_T = torch.arange(len(layout)) if sorted_already else key_T.argsort()
    owner_T = owner_T[token_T]
    gap_T = (owner_T.diff() == 0) & (layout.position_T[token_T].diff() != 1)
    if gap_T.any():
        document = int(layout.document_T[token_T[1:][gap_T][0]])
        raise ValueError(f"document {document}: positions of a source and of each draw of a target must be "
                         "consecutive and distinct")
    return token_T, owner_T


def _windows(streams: _Streams, pattern: AttentionPattern, kernel: Callable[..., Kernel]) -> list[Part]:
    """Part 1, one for each run of heads of equal dilation."""
    inner_N = ~streams.leads_N
    token_N, query_N, length_S = streams.token_N[inner_N], streams.query_N[inner_N], streams.lengths(inner_N)
    ordinary_N = ~streams.global_N[inner_N]
    parts, first = [], 0
    for dilation, run in groupby(pattern.dilations if len(token_N) else ()):
        heads = slice(first, first + len(list(run)))
        first, count = heads.stop, _count(heads)
        order_N, length_C = _residue_classes(length_S, dilation)
        parts.append(Part(
            kernel(Segments.of(length_C, length_C, pattern.window), heads=count), heads,
            _rows(query_N[order_N]), _rows(token_N[order_N]),
            count * _window_pairs(length_C, pattern.window, ordinary_N[order_N]), sets_rows=True))
    return parts


def _window_pairs(length_S: Tensor, window: tuple[int, int], ordinary_N: Tensor) -> int:
    """Keys that the queries marked in `ordinary_N` see within segments of these lengths."""
    rank_N, last_N = _ranks(length_S), torch.repeat_interleave(length_S - 1, length_S)
    seen_N = rank_N.clamp(max=window[0]) + (last_N - rank_N).clamp(max=window[1]) + 1
    return int(seen_N[ordinary_N].sum())


def _residue_classes(length_S: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    """Order that brings each stream's tokens of equal place modulo `dilation` together, and the classes' lengths."""
    if dilation == 1:
        return torch.arange(int(length_S.sum())), length_S[length_S > 0]
    length_SR = (length_S[:, None] - torch.arange(dilation) + dilation - 1) // dilation
    start_SR = (length_SR.flatten().cumsum(0) - length_SR.flatten()).view_as(length_SR)
    rank_N = _ranks(length_S)
    stream_N = torch.repeat_interleave(length_S)
    order_N = torch.empty_like(rank_N)
    order_N[start_SR[stream_N, rank_N % dilation] + rank_N // dilation] = torch.arange(len(rank_N))
    return order_N, length_SR[length_SR > 0]


def _whole(streams: _Streams, asking_N: Tensor, seen_N: Tensor, heads: int, kernel: Callable[..., Kernel],
           sets_rows: bool = False, counted_N: Tensor | None = None) -> list[Part]:
    """Every asking token sees every seen token of its stream: parts 2, 3 and 5. counted_N: of the asking ones, those
    whose pairs count, if not all."""
    counted_S = streams.lengths(asking_N if counted_N is None else counted_N)
    asking_S, seen_S = streams.lengths(asking_N), streams.lengths(seen_N)
    both_S = (asking_S > 0) & (seen_S > 0)
    if not both_S.any():
        return []
    asking_S, seen_S, both_N = asking_S[both_S], seen_S[both_S], both_S[streams.stream_N]
    return [Part(kernel(Segments.of(asking_S, seen_S), heads=heads), slice(0, heads),
                 _rows(streams.query_N[asking_N & both_N]), _rows(streams.token_N[seen_N & both_N]),
                 int((counted_S[both_S] * seen_S).sum()) * heads, sets_rows=sets_rows)]


def _scattered(streams: _Streams, key_N: Tensor, pattern: AttentionPattern, kernel: Callable[..., Kernel],
               ) -> list[Part]:
    """Part 4, with a mask for each stream; the stream's global queries take part without seeing anything."""
    keys_S = streams.lengths(key_N)
    most = int(keys_S.max())
    if most > MAX_SCATTERED_GLOBALS:
        raise ConfigError("model.attention.global_tokens", f"{most} global tokens lie scattered over a document; "
                          f"at most {MAX_SCATTERED_GLOBALS} can: choose fewer, or a prefix, whose length is free")
    asking_N, lengths_S = (keys_S > 0)[streams.stream_N], keys_S[keys_S > 0]
    asking_S = streams.lengths(asking_N)[keys_S > 0]
    dilations = sorted(set(pattern.dilations))
    (left, right), step_D11 = pattern.window, torch.tensor(dilations)[:, None, None]
    head_D = [dilations.index(dilation) for dilation in pattern.dilations] if len(dilations) > 1 else [0]
    masks_S = []
    for rank_Q, rank_K, global_Q in zip(
            streams.rank_N[asking_N].split(asking_S.tolist()), streams.rank_N[key_N].split(lengths_S.tolist()),
            streams.global_N[asking_N].split(asking_S.tolist()), strict=True):
        distance_QK = rank_K[None, :] - rank_Q[:, None]
        window_DQK = ((distance_QK >= -left * step_D11) & (distance_QK <= right * step_D11)
                      & (distance_QK % step_D11 == 0))
        masks_S.append(~(window_DQK | global_Q[:, None])[head_D])
    heads = len(pattern.dilations)
    pairs = sum(int(mask.sum()) * heads // len(mask) for mask in masks_S)
    return [Part(kernel(Segments.of(asking_S, lengths_S, masks_S=tuple(masks_S)), heads=heads), slice(0, heads),
                 _rows(streams.query_N[asking_N]), _rows(streams.token_N[key_N]), pairs)]


def _ranks(length_S: Tensor) -> Tensor:
    """0, 1, .. length - 1 for each length in turn."""
    starts_S = length_S.cumsum(0) - length_S
    return torch.arange(int(length_S.sum())) - torch.repeat_interleave(starts_S, length_S)


def _rows(index_N: Tensor) -> Rows:
    if bool((index_N.diff() == 1).all()):
        return slice(int(index_N[0]), int(index_N[0]) + len(index_N))
    return index_N


def _count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _move(rows: Rows, device: torch.device | str) -> Rows:
    return rows if isinstance(rows, slice) else sent(rows, device)
