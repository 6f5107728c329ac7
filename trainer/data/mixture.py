"""What an epoch holds, and in which order: the same on every rank, known from (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_PASS_KEY = 2  # keeps the order within a corpus apart from an epoch's, whose keys are (seed, epoch)


class Part(NamedTuple):
    """A corpus of a mixture: its samples low to high - 1, and how often an epoch holds each of them."""

    name: str
    low: int
    high: int
    weight: float

    def __len__(self) -> int:
        return self.high - self.low

    @property
    def samples_per_epoch(self) -> int:
        """Weight times the samples, rounded, but at least one where there are any."""
        return max(round(self.weight * len(self)), min(1, len(self)))


class Mixture:
    """The epochs of one or more corpora, shuffled together.

    Each corpus is an endless sequence of passes, every pass a permutation of its samples given by (seed, corpus, pass).
    An epoch takes the next `samples_per_epoch` of each corpus and shuffles them all by (seed, epoch). So within a
    corpus no sample comes an (n + 1)-th time in an earlier epoch than another one its n-th, whatever the weight; with
    weight 1 an epoch holds every sample exactly once.
    """

    def __init__(self, parts: Sequence[Part], seed: int):
        self._parts, self._seed = parts, seed

    def epoch(self, epoch: int) -> np.ndarray:
        """The samples of an epoch in order."""
        chosen = np.concatenate([self._next(number, part, epoch) for number, part in enumerate(self._parts)])
        return chosen[keyed_order(len(chosen), self._seed, epoch)]

    def _next(self, number: int, part: Part, epoch: int) -> np.ndarray:
        size, count = len(part), part.samples_per_epoch
        first, last = epoch * count, (epoch + 1) * count
        taken = [np.empty(0, np.int64)]
        for turn in range(first // size, -(-last // size)) if size else ():
            low, high = max(first - turn * size, 0), min(last - turn * size, size)
            whole = high - low == size  # its order is the epoch's own
            order = np.arange(size) if whole else keyed_order(size, _PASS_KEY, self._seed, number, turn)
            taken.append(part.low + order[low:high])
        return np.concatenate(taken)


def keyed_order(count: int, *keys: int) -> np.ndarray:
    """A permutation of `count` things that depends on the integer keys alone, on every machine and
    version."""
    state = np.uint64(0)
    for key in keys:
        state = _mix(state + np.uint64(key % (1 << 64)))
    return np.argsort(_mix(state + np.arange(count, dtype=np.uint64) * _GOLDEN), kind="stable")


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """SplitMix64 (Steele et al. 2014): its increment and its finalizer."""
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
