"""Runs of `trainer/run.py` in which something goes wrong: faults are put into the program from outside, by replacing
its functions in the process of a rank."""

import errno
import json
import math
import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.trainer.forked import free_port, launch, run_rank
from trainer.checkpoint_folder import MANIFEST


def rank_with_fault(command: list[str], folder: Path, rank: int, world: int, port: int, fault) -> None:
    """Target of a process: one rank, with `fault(rank)` done to it beforehand."""
    fault(rank)
    run_rank(command, folder, rank, world, port)


def start_with_fault(launcher, folder: Path, command: list[str], world: int, fault) -> list:
    """Processes of all ranks, to be started."""
    port = free_port()
    return [launcher.Process(target=rank_with_fault, args=(command, folder, rank, world, port, fault))
            for rank in range(world)]


def run_with_fault(launcher, folder: Path, command: list[str], world: int, seconds: float,
                   fault) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of all ranks."""
    return launch(launcher, folder, command, world, seconds, rank_main=partial(rank_with_fault, fault=fault))


def nothing(rank: int) -> None:
    """No fault."""


@dataclass(frozen=True)
class NanNoise:
    """The noise of some (0-based) steps of one rank is not a number."""

    rank: int
    steps: tuple[int, ...]

    def __call__(self, rank: int) -> None:
        from trainer import loop
        draw_of = loop.training_draw

        def spoilt(batch, config, seed, step):
            draw = draw_of(batch, config, seed, step)
            if rank == self.rank and step in self.steps:
                draw.noise_NE.fill_(math.nan)
            return draw

        loop.training_draw = spoilt


@dataclass(frozen=True)
class AtBeat:
    """Something happens to one rank at its first sign of life in a phase, at `step` (from 1 on) or later.

    signal: it gets this signal (SIGKILL and SIGSTOP included). file: this empty file is made. sleep: it stands still.
    """

    rank: int
    phase: str
    step: int = 5
    signal: int = 0
    file: Path | None = None
    sleep: float = 0.0

    def __call__(self, rank: int) -> None:
        from trainer import signals, watchdog
        signals._LOOK_EVERY = 0.0
        beat, due = watchdog.Watchdog.beat, Countdown(0)

        def noticed(dog, phase, step):
            beat(dog, phase, step)
            if rank == self.rank and phase == self.phase and step >= self.step and due():
                if self.file is not None:
                    self.file.touch()
                if self.signal:
                    os.kill(os.getpid(), self.signal)
                time.sleep(self.sleep)

        watchdog.Watchdog.beat = noticed


@dataclass(frozen=True)
class SignalWhilePreparing:
    """Preparing data takes for ever, and one rank gets a signal meanwhile."""

    rank: int
    signal: int

    def __call__(self, rank: int) -> None:
        from trainer import loop

        def prepare(*arguments, **options):
            if rank == self.rank:
                os.kill(os.getpid(), self.signal)
            time.sleep(1000)

        loop.prepare = prepare


@dataclass(frozen=True)
class FullDisk:
    """A rank finds no room for the checkpoints of some steps, half way through its files."""

    rank: int
    steps: tuple[int, ...]

    def __call__(self, rank: int) -> None:
        from trainer import checkpoint
        write = checkpoint._write_shards

        def no_room(temporary, files, go_on):
            if rank == self.rank and int(temporary.name.rpartition("-")[2]) in self.steps:
                write(temporary, dict(list(files.items())[:1]), go_on)
                raise OSError(errno.ENOSPC, "No space left on device")
            write(temporary, files, go_on)

        checkpoint._write_shards = no_room


@dataclass(frozen=True)
class SlowDisk:
    """Writing a rank's part of a checkpoint takes so long."""

    seconds: float

    def __call__(self, rank: int) -> None:
        from trainer import checkpoint
        write = checkpoint._write_shards

        def slow(temporary, files, go_on):
            time.sleep(self.seconds)
            write(temporary, files, go_on)

        checkpoint._write_shards = slow


PHASES = ("shard", "fsync", "manifest", "rename", "prune")


@dataclass(frozen=True)
class KillWhileSaving:
    """SIGKILL inside a phase of the `number`-th save (from 0 on) of a start: of the rank in that phase, or of all.

    `rank` is the one in the phase; only the first rank writes manifests, renames and prunes. `late`: further on in it.
    """

    phase: str
    number: int
    rank: int
    everyone: bool
    late: bool
    run_dir: Path

    def __call__(self, rank: int) -> None:
        if rank == self.rank:
            getattr(self, f"_in_{self.phase}")(Countdown(self.number))

    def _kill(self) -> None:
        if self.everyone:
            for beat in (self.run_dir / "heartbeats").glob("rank*.json"):
                process = json.loads(beat.read_text())["process"]
                if process != os.getpid():
                    os.kill(process, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def _in_shard(self, due) -> None:
        from trainer import checkpoint
        write = checkpoint._write_shards

        def killed(temporary, files, go_on):
            if not due():
                return write(temporary, files, go_on)
            name, state = list(files.items())[-1 if self.late else 0]
            write(temporary, {name: state}, go_on)
            path = temporary / name
            os.truncate(path, path.stat().st_size // 2)
            self._kill()

        checkpoint._write_shards = killed

    def _in_fsync(self, due) -> None:
        from trainer import checkpoint
        seal = checkpoint._seal

        def killed(temporary, files, go_on):
            if not due():
                return seal(temporary, files, go_on)
            if self.late:
                seal(temporary, dict(list(files.items())[:1]), go_on)
            self._kill()

        checkpoint._seal = killed

    def _in_manifest(self, due) -> None:
        from trainer import checkpoint
        write = checkpoint._write_manifest

        def killed(temporary, manifest):
            write(temporary, manifest)
            if due():
                path = temporary / MANIFEST
                os.truncate(path, path.stat().st_size * self.late // 2)
                self._kill()

        checkpoint._write_manifest = killed

    def _in_rename(self, due) -> None:
        from trainer import checkpoint
        publish = checkpoint._publish

        def killed(temporary, final):
            if not due():
                return publish(temporary, final)
            if self.late:
                temporary.rename(final)
            self._kill()

        checkpoint._publish = killed

    def _in_prune(self, due) -> None:
        from trainer import checkpoint
        remove = checkpoint._remove

        def killed(folder):
            if not due():
                return remove(folder)
            (folder / MANIFEST).unlink(missing_ok=True)  # one that an earlier kill left
            if self.late:
                for path in list(folder.rglob("*.pt"))[:1]:
                    path.unlink()
            self._kill()

        checkpoint._remove = killed


class Countdown:
    """Says yes at the call with the given number, from 0 on."""

    def __init__(self, number: int):
        self.left = number

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == -1
