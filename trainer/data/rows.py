"""Which samples share a row: an endless sequence of rows, epoch after epoch, the same on every rank."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from threading import Lock

import numpy as np

from trainer.data.mixture import Mixture


def pack_rows(tokens_S: np.ndarray, order_S: np.ndarray, row_tokens: int,
              lookahead: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples in the order of their rows, and where each row starts (one more than there are rows).

    The sample that waits longest opens a row; then the largest of the next `lookahead` samples that fits is
    added, until none fits. So no sample waits for ever, and memory and time are O(S log lookahead).
    """
    count = len(order_S)
    # A waiting sample is the number tokens * count + place: sorted by size, then by place in the order.
    keys = (tokens_S[order_S] * count + np.arange(count)).tolist()
    waiting: list[int] = []
    taken = bytearray(count)
    placed, starts = [], [0]
    arrived = oldest = 0
    while len(placed) < count:
        room = row_tokens
        while True:
            while arrived < count and len(waiting) < lookahead:
                insort(waiting, keys[arrived])
                arrived += 1
            if room == row_tokens:
                while taken[oldest]:
                    oldest += 1
                at = bisect_left(waiting, keys[oldest])
            else:
                fits = bisect_right(waiting, (room + 1) * count - 1) - 1
                if fits < 0:
                    break
                at = bisect_left(waiting, waiting[fits] // count * count)  # of those as large, the oldest
            tokens, place = divmod(waiting.pop(at), count)
            taken[place] = 1
            placed.append(place)
            room -= tokens
        starts.append(len(placed))
    return order_S[np.array(placed, np.int64)], np.array(starts, np.int64)


class RowStream:
    """Rows of all epochs in one sequence: row numbers go on from an epoch to the next.

    What an epoch holds, and in which order, the mixture says. Rows never mix epochs. To
    find a row, the number of rows in each earlier epoch must be known: the first access to a late epoch packs
    those before it once (about a microsecond a sample and epoch); all later ones are immediate. Safe to share
    between threads.
    """

    def __init__(self, tokens_S: np.ndarray, mixture: Mixture, *, row_tokens: int, lookahead: int):
        self._tokens_S, self._mixture, self._row_tokens, self._lookahead = tokens_S, mixture, row_tokens, lookahead
        self._ends: list[int] = []  # row number behind the last of each epoch
        self._recent: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = Lock()

    def locate(self, row: int) -> tuple[int, int, int]:
        """(epoch, place of the row in it, rows in it)."""
        with self._lock:
            while not self._ends or self._ends[-1] <= row:
                self._epoch(len(self._ends))
            epoch = bisect_right(self._ends, row)
            first = self._ends[epoch - 1] if epoch else 0
            return epoch, row - first, self._ends[epoch] - first

    def __getitem__(self, row: int) -> np.ndarray:
        """The samples of a row."""
        epoch, place, _ = self.locate(row)
        with self._lock:
            samples, starts = self._epoch(epoch)
        return samples[starts[place]:starts[place + 1]]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._recent:
            packed = pack_rows(self._tokens_S, self._mixture.epoch(epoch), self._row_tokens, self._lookahead)
            if epoch == len(self._ends):
                self._ends.append((self._ends[-1] if self._ends else 0) + len(packed[1]) - 1)
            while len(self._recent) >= 2:  # a step may reach from one epoch into the next
                del self._recent[min(self._recent)]
            self._recent[epoch] = packed
        return self._recent[epoch]
