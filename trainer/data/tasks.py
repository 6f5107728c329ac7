"""What a sample is trained to do in a step: as it is, without its source, or with gaps in its target to be filled.

Keyed by (seed, step, sample), so that every rank knows the whole step without a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from model.keyed_random import keyed_generator
from model.packing import Segment
from trainer.data.packing import Samples
from trainer.randomness import Stream

MOST_GAPS = 3


@dataclass(frozen=True)
class Task:
    """without_source: the source is emptied. given: bool over text and </s>, which of them are given instead of
    noised; None for none."""

    without_source: bool = False
    given: np.ndarray | None = None

    def of(self, segment: Segment) -> Segment:
        """The segment with the given tokens marked. Where the end is given, there is no filler behind it: with a
        length that is known it would be all that a model could learn there."""
        if self.given is None:
            return segment
        canvas = segment.canvas[:self.canvas_tokens(len(segment.canvas))]
        given = np.zeros(len(canvas), bool)
        given[:len(self.given)] = self.given
        return replace(segment, canvas=canvas, given=given)

    def canvas_tokens(self, whole: int) -> int:
        """Length of the canvas that is left of a whole one."""
        return len(self.given) if self.given is not None and self.given[-1] else whole

    @property
    def given_tokens(self) -> int:
        return 0 if self.given is None else int(self.given.sum())


def step_tasks(samples: Samples, chosen: Sequence[int], source_dropout: float, infilling: float, seed: int,
               step: int) -> list[Task]:
    """The tasks of all samples of a step's global batch, in their order."""
    if source_dropout == 0 and infilling == 0:
        return [Task()] * len(chosen)
    tasks = []
    for sample in chosen:
        generator = keyed_generator(Stream.TASK, seed, step, int(sample))
        drop, infill = torch.rand(2, generator=generator).tolist()
        given = None
        if infill < infilling:
            given = ~gaps(int(samples.loss_tokens_S[sample]), generator)
        tasks.append(Task(drop < source_dropout, given))
    return tasks


def gaps(tokens: int, generator: torch.Generator) -> np.ndarray:
    """Bool [tokens], True in one to MOST_GAPS stretches between random places of a text: about two fifths of it, and
    one token at least."""
    number = min(int(torch.randint(1, MOST_GAPS + 1, (), generator=generator)), (tokens + 1) // 2)
    bounds = torch.randperm(tokens + 1, generator=generator)[:2 * number].sort().values.tolist()
    inside = np.zeros(tokens, bool)
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        inside[start:end] = True
    return inside
