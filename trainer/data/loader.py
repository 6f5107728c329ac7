"""Batches of training steps, by step number alone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model.batch import PackedBatch
from model.packing import pack
from trainer.data.mixture import Mixture, keyed_order
from trainer.data.packing import Samples
from trainer.data.rows import RowStream
from trainer.data.tasks import Task, step_tasks

_STRATA_KEY = 1  # keeps the strata's permutations apart from the epochs'


@dataclass(frozen=True)
class StepInfo:
    """What a step's global batch holds, over all ranks and micro-batches; known to every rank without a
    message."""

    step: int
    epoch: float
    """Epochs done before this step, with the fraction of the one in progress."""
    rows: int
    documents: int
    """Samples; more than there are in the corpus where a step is longer than an epoch."""
    copies: int
    """Noised copies, documents x draws: the strata of the time sampling."""
    tokens: int
    """All tokens: sources and canvases."""
    source_tokens: int
    target_tokens: int
    """Those of the canvases, filler included."""
    loss_tokens: int
    """Target tokens that are trained on: the denominator of the mean loss."""
    fill: float
    """Share of the rows' room that is tokens."""


class PackedLoader:
    """Micro-batches of this rank for any step.

    Step s takes rows s * G to (s + 1) * G - 1 of the endless row sequence, G = rows_per_micro_batch *
    accumulation * world; within it, micro-batch a of rank r takes the rows from (a * world + r) *
    rows_per_micro_batch on. So a step is a function of (samples, seed, s) and of G: whatever the world size,
    the global batch is the same, and to resume exactly nothing needs to be saved but the step and its first row.
    `resume` with these makes a run go on with the next row even where G has changed,
    which the trainer refuses (`trainer/topology.py`).

    source_dropout, infilling: how often a sample loses its source, or is given parts of its target
    (`trainer/data/tasks.py`).

    stratum_C: with D documents in the step, draw r of a document lies in the r-th part of D strata, at a
    place that is shuffled by (seed, step): the draws of a document cover all noise levels, and so do the
    documents of a rank.
    """

    def __init__(self, samples: Samples, *, rows_per_micro_batch: int, accumulation: int = 1, rank: int = 0,
                 world: int = 1, seed: int = 0, lookahead: int = 256, prefetch: int = 2,
                 source_dropout: float = 0.0, infilling: float = 0.0):
        self.samples = samples
        self._source_dropout, self._infilling = source_dropout, infilling
        self.rows = RowStream(samples.tokens_S, Mixture(samples.parts, seed), row_tokens=samples.row_tokens,
                              lookahead=lookahead)
        self.rows_per_step = rows_per_micro_batch * accumulation * world
        self._micro, self._accumulation = rows_per_micro_batch, accumulation
        self._rank, self._world = rank, world
        self._seed, self._prefetch = seed, prefetch
        self._origin = (0, 0)

    def resume(self, step: int, row: int) -> None:
        """Lets `step` begin with `row`, as `first_row` said when the run was saved."""
        self._origin = (step, row)

    def first_row(self, step: int) -> int:
        """The row that a step begins with; those before it are done."""
        origin, row = self._origin
        return row + (step - origin) * self.rows_per_step

    def step(self, step: int) -> tuple[StepInfo, list[PackedBatch]]:
        """The step's facts and this rank's micro-batches, `accumulation` of them."""
        samples, draws = self.samples, self.samples.draws
        first = self.first_row(step)
        rows = [self.rows[row] for row in range(first, first + self.rows_per_step)]
        starts = np.cumsum([0, *map(len, rows)])
        count = int(starts[-1])
        place_D = keyed_order(count, _STRATA_KEY, self._seed, step)
        stratum_DR = place_D[:, None] + count * np.arange(draws)
        chosen = np.concatenate(rows)
        tasks = step_tasks(samples, chosen, self._source_dropout, self._infilling, self._seed, step)
        batches = []
        for accumulated in range(self._accumulation):
            low = (accumulated * self._world + self._rank) * self._micro
            row_D = np.repeat(np.arange(self._micro), np.diff(starts[low:low + self._micro + 1]))
            mine = slice(starts[low], starts[low + self._micro])
            segments = [task.of(samples.segment(sample))
                        for sample, task in zip(chosen[mine], tasks[mine], strict=True)]
            batch = pack(segments, row_D, self._micro, stratum_DR[mine], count * draws)
            dropped_D = torch.tensor([task.without_source for task in tasks[mine]])
            batches.append(batch.without_sources(dropped_D) if dropped_D.any() else batch)
        return self._info(step, first, chosen, tasks), batches

    def _info(self, step: int, first: int, chosen: np.ndarray, tasks: Sequence[Task]) -> StepInfo:
        epoch, place, of = self.rows.locate(first)
        samples = self.samples
        sources = samples.source_tokens_S[chosen]
        sources = int(np.where([task.without_source for task in tasks], np.minimum(sources, 2), sources).sum())
        targets = samples.draws * sum(task.canvas_tokens(samples.canvas_tokens) for task in tasks)
        loss_tokens = int(samples.loss_tokens_S[chosen].sum()) - sum(task.given_tokens for task in tasks)
        return StepInfo(
            step=step, epoch=epoch + place / of, rows=self.rows_per_step, documents=len(chosen),
            copies=len(chosen) * samples.draws, tokens=sources + targets,
            source_tokens=sources, target_tokens=targets, loss_tokens=loss_tokens * samples.draws,
            fill=(sources + targets) / (self.rows_per_step * samples.row_tokens))

    def stream(self, start_step: int = 0, finish: Callable[[int, PackedBatch], Any] = lambda step, batch: batch,
               ) -> Iterator[tuple[StepInfo, list]]:
        """Steps from `start_step` on, without end, made ahead in a background thread, which also applies `finish` to
        each step's number and micro-batch.

        Errors of the thread are raised here. Closing the iterator (or dropping it) ends the thread.
        """
        ready: queue.Queue = queue.Queue(self._prefetch)
        closed = threading.Event()

        def put(item) -> None:
            while not closed.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def work() -> None:
            step = start_step
            try:
                while not closed.is_set():
                    info, batches = self.step(step)
                    put((info, [finish(step, batch) for batch in batches]))
                    step += 1
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=work, name="data loader", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            thread.join()
