"""Samples become packed batches: segments side by side in one stream, for training and for generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from model.batch import PackedBatch


@dataclass(frozen=True)
class Segment:
    """One sample's tokens: `source` with <bos> and </s> (or empty), the whole `canvas` of the target, of
    which the first `loss_tokens` are text and its </s>, and the sample's number in the data set. given: bool,
    which tokens of the canvas are given instead of noised (infilling); None for none."""

    source: np.ndarray
    canvas: np.ndarray
    loss_tokens: int
    sample: int
    given: np.ndarray | None = None


def source_segment(ids: Sequence[int] | np.ndarray, max_tokens: int, bos_id: int, eos_id: int) -> np.ndarray:
    """<bos>, the first of `ids`, </s>: at most `max_tokens` (0: no limit), int64."""
    kept = ids[:max_tokens - 2] if max_tokens else ids
    return np.concatenate([[bos_id], np.asarray(kept, np.int64), [eos_id]])


def pack(segments: Sequence[Segment], row_D: np.ndarray, rows: int, stratum_DR: np.ndarray,
         strata: int) -> PackedBatch:
    """One stream of all segments (D of them), each with R copies of its canvas behind its source.

    row_D: the row a document lies in, of `rows`. stratum_DR: place of every copy among the `strata` copies of
    the global batch. Result on the CPU, integers int64.
    """
    import torch  # here, so that processes that only prepare documents start in a fraction of the time and memory

    from model.batch import PackedBatch

    documents, draws = stratum_DR.shape
    source_D = np.array([len(s.source) for s in segments], np.int64)
    loss_D = np.array([s.loss_tokens for s in segments], np.int64)
    canvas_D = np.array([len(s.canvas) for s in segments], np.int64)
    lengths = np.concatenate([source_D[:, None], np.repeat(canvas_D[:, None], draws, 1)], 1).ravel()
    part_T = np.repeat(np.arange(documents * (draws + 1)), lengths)
    document_T, slot_T = np.divmod(part_T, draws + 1)
    offset_T = counting(lengths)
    given_T = np.concatenate([part for s in segments for part in (np.zeros(len(s.source), bool), *[
        np.zeros(len(s.canvas), bool) if s.given is None else s.given] * draws)])
    is_target_T = (slot_T > 0) & ~given_T
    draw_T = np.maximum(slot_T - 1, 0)
    return PackedBatch(
        tokens_T=torch.from_numpy(np.concatenate([part for s in segments for part in
                                                  (s.source, *[s.canvas] * draws)])),
        document_T=torch.from_numpy(document_T),
        position_T=torch.from_numpy(offset_T + (slot_T > 0) * source_D[document_T]),
        is_target_T=torch.from_numpy(is_target_T),
        draw_T=torch.from_numpy(draw_T),
        in_loss_T=torch.from_numpy(is_target_T & (offset_T < loss_D[document_T])),
        is_given_T=torch.from_numpy(given_T),
        row_T=torch.from_numpy(row_D[document_T]),
        copy_T=torch.from_numpy(document_T * draws + draw_T),
        sample_C=torch.from_numpy(np.repeat(np.array([s.sample for s in segments], np.int64), draws)),
        draw_C=torch.from_numpy(np.tile(np.arange(draws), documents)),
        stratum_C=torch.from_numpy(stratum_DR.ravel()),
        rows=rows, documents=documents, strata=strata)


def generation_batch(sources: Sequence[np.ndarray], *, canvas_tokens: int, pad_id: int, candidates: int = 1,
                     samples: Sequence[int] | None = None, share_sources: bool = True) -> PackedBatch:
    """For each source, `candidates` canvases of <pad> to be generated; nothing is in the loss.

    sources: ids as `source_segment` gives them; empty ones for a model without sources.
    samples: keys of the randomness, by default 0, 1, ...
    share_sources: as in `candidates_batch`.
    """
    keys = range(len(sources)) if samples is None else samples
    canvas = np.full(canvas_tokens, pad_id, np.int64)
    segments = [Segment(source, canvas, 0, key) for source, key in zip(sources, keys, strict=True)]
    return candidates_batch(segments, candidates=candidates, share_sources=share_sources)


def candidates_batch(segments: Sequence[Segment], *, candidates: int = 1, share_sources: bool = True) -> PackedBatch:
    """Each segment with `candidates` canvases to be generated, copy by copy; nothing is in the loss. Canvases may
    differ in length.

    share_sources: the candidates share one source (cached conditioning); otherwise each is a document of its own, as
    joint conditioning needs it. Their randomness is keyed by (sample, draw) either way.
    """
    if share_sources:
        stratum_DR = np.arange(len(segments) * candidates).reshape(len(segments), candidates)
        return pack(segments, np.zeros(len(segments), np.int64), 1, stratum_DR, stratum_DR.size)
    repeated = [segment for segment in segments for _ in range(candidates)]
    batch = candidates_batch(repeated)
    return replace(batch, draw_C=batch.draw_C.new_tensor(range(candidates)).repeat(len(segments)))


def counting(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... for each of the lengths in turn."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
