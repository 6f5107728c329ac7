"""Where every rank is, on disk, and an end with names for a run that no longer moves.

Each rank's thread writes `heartbeats/rank*.json` (host, process, phase, step) into the run folder every few seconds,
whatever the main thread waits for. If the main thread makes no progress for `limit` seconds, the thread writes the
stacks of all threads to `logs/`, says which ranks are silent (dead or frozen) and which are furthest behind, and ends
the process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import sys
import threading
import time
from pathlib import Path

from trainer import failure
from trainer.errors import ExitCode

_BEAT_SECONDS = 5.0
SILENT_BEATS = 3
"""A rank is silent if its file is this many beats older than another's own."""
_STRAGGLER_SECONDS = 0.05


class Watchdog:
    """minutes: the limit; 0: heartbeats only."""

    def __init__(self, run_dir: Path, rank: int, world: int, minutes: float):
        self._heartbeats, self._logs = run_dir / "heartbeats", run_dir / "logs"
        self._rank, self._world = rank, world
        self._limit = 60 * minutes
        self._interval = min(_BEAT_SECONDS, self._limit / 10) if minutes > 0 else _BEAT_SECONDS
        self._place: tuple[str, int] = ("start", 0)
        self._beats = 0
        self._moved = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watchdog", daemon=True)

    def start(self) -> None:
        """The time before does not count."""
        self._moved = time.monotonic()
        self._heartbeats.mkdir(exist_ok=True)
        self._logs.mkdir(exist_ok=True)
        self._write()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; the last heartbeat says that this rank has ended."""
        self.beat("ended", self._place[1])
        self._done.set()
        self._thread.join(2 * _BEAT_SECONDS)
        faulthandler.cancel_dump_traceback_later()

    def beat(self, phase: str, step: int) -> None:
        """The main thread has got here: a part of a step, a batch of an evaluation, a step of a sampler. Every rank
        comes by the same places, so that a rank with fewer beats is behind. Costs nothing."""
        self._place, self._moved = (phase, step), time.monotonic()
        self._beats += 1

    def alive(self) -> None:
        """What the main thread waits for goes on, at the same place."""
        self._moved = time.monotonic()

    def missing(self) -> str:
        """Names the ranks that have died or frozen, or is empty: for a rank that has lost contact. Waits until a
        heartbeat would have come, unless a process of this host is already known to have died."""
        if self._world == 1 or not self._thread.is_alive():
            return ""
        deadline = time.monotonic() + (SILENT_BEATS + 1) * self._interval
        while True:
            gone = [beat for beat in self._others() if _has_died(beat) or self._is_silent(beat)]
            if gone or time.monotonic() > deadline:
                return "; ".join(_describe(beat) for beat in gone)
            time.sleep(self._interval / 5)

    def _work(self) -> None:
        with (self._logs / f"stacks-rank{self._rank:05d}.txt").open("a") as stacks:
            while not self._done.wait(self._interval):
                self._write()
                if self._limit == 0:
                    continue
                # Should even this thread not get its turn: PyTorch or a kernel that never gives the interpreter back.
                faulthandler.dump_traceback_later(self._limit + 60, exit=True, file=stacks)
                if time.monotonic() - self._moved > self._limit:
                    faulthandler.dump_traceback(stacks, all_threads=True)
                    stacks.flush()
                    self._end(stacks.name)
            self._write()

    def _end(self, stacks: str) -> None:
        phase, step = self._place
        others = self._others()
        silent = [beat for beat in others if self._is_silent(beat)]
        waiting = [beat for beat in others if beat not in silent]
        last = min([self._beats, *(beat["beats"] for beat in waiting)])
        behind = [beat for beat in waiting if beat["beats"] == last < self._beats]
        names = [f"no sign of life from {_describe(beat)}" for beat in silent]
        names += [f"behind is {_describe(beat)}" for beat in behind]
        if any(beat["beats"] > self._beats for beat in waiting):
            names.append("other ranks wait for this one")
        line = (f"error: no progress for {self._limit / 60:g} minutes (train.hang_minutes): rank {self._rank} is in "
                f"{phase} at step {step}; {'; '.join(names) or 'all ranks are at this place'}. Stacks are in "
                f"{stacks}; started again, the run continues from its newest checkpoint")
        speaks, code = failure.report(ExitCode.HANG)
        if speaks:
            print(line, file=sys.stderr, flush=True)
        failure.leave(code)

    def _others(self) -> list[dict]:
        beats = []
        for rank in range(self._world):
            path = self._file(rank)
            if rank == self._rank:
                continue
            try:
                beats.append({**json.loads(path.read_text()), "written": path.stat().st_mtime})
            except (OSError, json.JSONDecodeError):  # it never got as far as writing one
                beats.append({"rank": rank, "host": "?", "process": 0, "phase": "start", "step": 0, "beats": 0,
                              "written": 0.0})
        return beats

    def _is_silent(self, beat: dict) -> bool:
        # Both times are the file server's, so that clocks of hosts need not agree.
        try:
            own = self._file(self._rank).stat().st_mtime
        except OSError:  # a disk that was full from the start: nothing can be said
            return False
        return beat["phase"] != "ended" and own - beat["written"] > SILENT_BEATS * self._interval

    def _write(self) -> None:
        phase, step = self._place
        values = {"rank": self._rank, "host": platform.node(), "process": os.getpid(), "phase": phase, "step": step,
                  "beats": self._beats, "seconds_there": round(time.monotonic() - self._moved, 1),
                  "time": round(time.time(), 1)}
        try:
            temporary = self._file(self._rank).with_suffix(".tmp")
            temporary.write_text(json.dumps(values) + "\n")
            temporary.rename(self._file(self._rank))
        except OSError:
            return  # a full disk: the next beat may find room, and no heartbeat is worth the run

    def _file(self, rank: int) -> Path:
        return self._heartbeats / f"rank{rank:05d}.json"


def _has_died(beat: dict) -> bool:
    """Whether the process is known to have ended: only for processes of this host."""
    if beat["host"] != platform.node() or beat["phase"] == "ended":
        return False
    try:
        # The state stands behind the name, which is in brackets and may hold anything.
        state = Path(f"/proc/{beat['process']}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def _describe(beat: dict) -> str:
    return (f"rank {beat['rank']} (host {beat['host']}, process {beat['process']}), last seen in {beat['phase']} at "
            f"step {beat['step']}")


def slowest(seconds_W: list[float]) -> int | None:
    """The rank that takes more than twice as long for its part of a step as the ranks do in the middle, and at least
    _STRAGGLER_SECONDS longer; None if there is none."""
    middle = sorted(seconds_W)[(len(seconds_W) - 1) // 2]
    rank = max(range(len(seconds_W)), key=seconds_W.__getitem__)
    return rank if seconds_W[rank] > max(2 * middle, middle + _STRAGGLER_SECONDS) else None
