"""Processes that share work whose results come back in order."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.queues import SimpleQueue

from model.errors import ConfigError

_WAITING = 2  # tasks for each process, done or not: bounds the memory, and keeps every process busy
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass(frozen=True)
class Workers:
    """`count` processes; without an executor all work is done in this one. option: what the user set the count by."""

    count: int = 1
    executor: Executor | None = None
    option: str = "data.workers"

    def map(self, function: Callable, items: Iterable) -> Iterator:
        """function(item) of every item, in their order whatever the number of processes, a few items ahead."""
        items = iter(items)
        first = list(islice(items, 2))
        items = chain(first, items)
        if self.executor is None or len(first) < 2:
            yield from map(function, items)
            return
        waiting = deque()
        try:
            for item in items:
                waiting.append(self.executor.submit(function, item))
                if len(waiting) > _WAITING * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ConfigError(self.option, f"one of {self.count} processes died, most likely for want of memory: give "
                              "a smaller number") from error
        finally:
            for future in waiting:
                future.cancel()


ALONE = Workers()


@contextlib.contextmanager
def local_workers(count: int = 0) -> Iterator[Workers]:
    """Processes of this machine, 0 for one a core, which start when there is enough work, and end with the block or
    with this process.

    They are forked: what they do is confined to plain Python, numpy and sentencepiece, so that they need neither the
    time nor the memory of an interpreter that imports PyTorch, whatever threads this process has.
    """
    count = count or len(os.sched_getaffinity(0))
    if count == 1:
        yield ALONE
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(count, mp_context=fork, initializer=_begin, initargs=(os.getpid(),)) as executor:
        yield Workers(count, executor)


@contextlib.contextmanager
def fresh_workers(count: int, option: str, begin: Callable, arguments: tuple) -> Iterator[Workers]:
    """`count` new interpreters, for work with PyTorch, which a fork does not survive. Each calls begin(index,
    *arguments) first, with an index of its own from 0 on."""
    spawn = multiprocessing.get_context("spawn")
    indices = spawn.SimpleQueue()
    for index in range(count):
        indices.put(index)
    with ProcessPoolExecutor(count, mp_context=spawn, initializer=_begin_fresh,
                             initargs=(os.getpid(), indices, begin, arguments)) as executor:
        yield Workers(count, executor, option)


def _begin_fresh(parent: int, indices: SimpleQueue, begin: Callable, arguments: tuple) -> None:
    _begin(parent)
    begin(indices.get(), *arguments)


def _begin(parent: int) -> None:
    """What a process does first: signals are for its parent, with which it ends even where that is killed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextlib.contextmanager
def mpi_workers() -> Iterator[Workers | None]:
    """All ranks of an MPI program but the first, to which alone it yields them; to the others None, once the first is
    done. An error of the first rank ends all of them."""
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor

    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        yield None if executor is None else Workers(MPI.COMM_WORLD.size - 1, executor)


def under_mpi() -> bool:
    """Whether an MPI launcher (Open MPI, MPICH, Intel MPI) started this process, as one of several."""
    return any(int(os.environ.get(name, "1")) > 1 for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
