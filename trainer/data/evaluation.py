"""Batches for evaluation: one pass, whole documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from model.batch import PackedBatch
from model.packing import pack
from trainer.data.packing import Samples
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
