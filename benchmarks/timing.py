"""Contenders measured in turns, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]
WARM_UPS, MOST_WARM_UPS = 2, 6
SETTLED = 0.01
"""Share of a turn's CPU time in the system. While it is greater, contenders still ask for memory, because blocks that
one of them freed fit into another's: no part of what a run costs from its second step on."""


class Spread(NamedTuple):
    """A median with the least and the greatest of what it was taken from."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def scaled(self, factor: float) -> Spread:
        return Spread(*(factor * each for each in self))


class Times(dict[str, list[float]]):
    """Seconds of every contender, turn by turn."""

    def seconds(self, name: str) -> Spread:
        return Spread.of(self[name])

    def ratio(self, slower: str, faster: str) -> Spread:
        """How many times as fast the second is, turn by turn."""
        return Spread.of([slow / fast for slow, fast in zip(self[slower], self[faster], strict=True)])

    def deeper(self, name: str, shallow: str, layers: int, fewer: int, deep: int) -> float:
        """Median seconds of `name` in `deep` instead of `layers` layers: as much for each further layer as for those
        that it has more than `shallow`, which has `fewer`."""
        whole, less = self.seconds(name).value, self.seconds(shallow).value
        return whole + (deep - layers) / (layers - fewer) * (whole - less)


def take_turns(runs: Mapping[str, Run], repeats: int, *, clock: Callable[[], float] = time.process_time) -> Times:
    """Runs every contender at least `WARM_UPS` times, until their memory is settled, then `repeats` times, one after
    the other. The clock is CPU time, which is wall time on an idle machine and says more on a busy one."""
    for turn in range(1, MOST_WARM_UPS + 1):
        before = os.times()
        for run in runs.values():
            run()
        user, system = (now - then for now, then in zip(os.times()[:2], before[:2], strict=True))
        if turn >= WARM_UPS and system <= SETTLED * (user + system):
            break
    times = Times({name: [] for name in runs})
    for _ in range(repeats):
        for name, run in runs.items():
            began = clock()
            run()
            times[name].append(clock() - began)
    return times


def profiled(run: Run, *, memory: bool = False) -> profile:
    """The profile of a run on the CPU. The profiler's library says in lines of its own when it starts and stops, among
    the benchmark's, unless it is told to be quiet."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=memory) as found:
        run()
    return found


def peak_mib(run: Run) -> float:
    """Peak of what a run on the CPU allocates, beyond what is there when it begins."""
    found = profiled(run, memory=True)
    held = peak = 0
    changes = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20
