"""Batches for evaluation (one pass, whole documents) and for generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from model.batch import PackedBatch
from trainer.data.packing import Samples, Segment, pack
from trainer.errors import DataError


class EvaluationBatch(NamedTuple):
    """A batch and its weight: 1, or 0 for one that only keeps a rank without documents in step with the
    others. A batch of weight 0 repeats another one and must be left out of every sum."""

    batch: PackedBatch
    weight: int


def evaluation_samples(count: int, limit: int = 0) -> np.ndarray:
    """Indices of `limit` samples (0: all) spread evenly over `count`, ascending: files are often sorted by
    origin, so that the first ones would not stand for all."""
    chosen = min(limit or count, count)
    return np.arange(chosen) * count // chosen


def evaluation_batches(samples: Samples, *, limit: int = 0, indices: Sequence[int] | None = None,
                       rank: int = 0, world: int = 1,
                       shuffle_sources: bool = False) -> Iterator[EvaluationBatch]:
    """One pass over `indices`, or over `limit` samples (0: all), in order, in batches of at most row_tokens
    tokens.

    Batch b is rank b % world's. Every rank gets the same number of batches. stratum_C counts all copies of
    the pass, draw by draw. With `shuffle_sources` every target is given the source of the next sample of the
    pass instead of its own: a model that uses its source does worse then. DataError where that is impossible.
    """
    chosen_P = evaluation_samples(len(samples), limit) if indices is None else np.asarray(indices, np.int64)
    source_P = np.roll(chosen_P, -1) if shuffle_sources else chosen_P
    if shuffle_sources and (len(chosen_P) < 2 or not samples.cache.paired):
        raise DataError(f"{samples.cache.name}: sources can only be exchanged between two or more "
                        "documents that have one")
    starts = _batch_starts(samples.source_tokens_S[source_P] + samples.draws * samples.canvas_tokens,
                           samples.row_tokens)
    stratum_PR = np.arange(len(chosen_P))[:, None] + len(chosen_P) * np.arange(samples.draws)
    count = len(starts) - 1
    for number in range(rank, -(-count // world) * world, world):
        low, high = starts[min(number, count - 1)], starts[min(number, count - 1) + 1]
        segments = [samples.segment(sample, source) for sample, source
                    in zip(chosen_P[low:high], source_P[low:high], strict=True)]
        batch = pack(segments, np.zeros(high - low, np.int64), 1, stratum_PR[low:high], stratum_PR.size)
        yield EvaluationBatch(batch, int(number < count))


def _batch_starts(tokens_P: np.ndarray, max_tokens: int) -> list[int]:
    """Bounds of consecutive groups of at most `max_tokens` tokens; a group holds one sample at least."""
    starts, held = [0], 0
    for place, tokens in enumerate(tokens_P.tolist()):
        if held and held + tokens > max_tokens:
            starts.append(place)
            held = 0
        held += tokens
    return [*starts, len(tokens_P)]


def generation_batch(sources: Sequence[np.ndarray], *, canvas_tokens: int, pad_id: int, candidates: int = 1,
                     samples: Sequence[int] | None = None, share_sources: bool = True) -> PackedBatch:
    """For each source, `candidates` canvases of <pad> to be generated; nothing is in the loss.

    sources: ids as `packing.source_segment` or `Samples.source` gives them; empty ones for a model without
    sources.
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
    return replace(batch, draw_C=torch.arange(candidates).repeat(len(segments)))
