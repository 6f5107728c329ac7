"""How sure a mean over documents is: percentile bootstrap (Efron & Tibshirani 1993; for comparisons Koehn 2004)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
_CHUNK = 100


class Interval(NamedTuple):
    """mean, and the bounds between which it lies in 95 % of the resampled sets of documents."""

    mean: float
    low: float
    high: float


def drawn_sets(documents: int, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
    """`resamples` sets of as many documents, drawn with repetition, in arrays [some, D] of their indices. The same
    seed and number of documents draw the same sets, so that systems are compared on equal ones."""
    generator = np.random.default_rng(seed)
    for first in range(0, resamples, _CHUNK):
        yield generator.integers(documents, size=(min(_CHUNK, resamples - first), documents))


def means(values_D: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Mean of each of the sets of documents."""
    values_D = np.asarray(values_D, dtype=np.float64)
    return np.concatenate([values_D[drawn].mean(1) for drawn in drawn_sets(len(values_D), resamples, seed)])


def interval(values_D: Sequence[float], resamples: int = RESAMPLES) -> Interval:
    low, high = np.percentile(means(values_D, resamples), (2.5, 97.5))
    return Interval(float(np.mean(values_D)), float(low), float(high))


def difference(values_D: Sequence[float], others_D: Sequence[float], resamples: int = RESAMPLES) -> Interval:
    """Of the first system's mean over the second's on the same documents; sure where 0 is not between the bounds."""
    return interval(np.subtract(values_D, others_D), resamples)
