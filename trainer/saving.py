"""When a run saves, and what its user is told of it; how a checkpoint is written is `trainer/checkpoint.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from trainer.checkpoint import SaveOutcome, Saver
from trainer.config import TrainConfig
from trainer.engine import Engine
from trainer.errors import CheckpointError
from trainer.metrics import MetricsLog
from trainer.watchdog import Watchdog


class Saving:
    """The saves of one run. All methods are collectives. saved_at: the step of the newest checkpoint."""

    def __init__(self, run_dir: Path, saver: Saver, engine: Engine, run: TrainConfig, saved_at: int,
                 log: MetricsLog, say: Callable[[str], None], watchdog: Watchdog):
        self._run_dir, self._saver, self._engine, self._in_background = run_dir, saver, engine, run.async_save
        self._may_reserve = run.async_save and 0 < run.save_every < run.steps
        self._log, self._say, self._watchdog = log, say, watchdog
        self._saved_at = saved_at
        self._problem: str | None = None

    def begin(self, step: int, facts: dict) -> None:
        """Begins a checkpoint of this step, which is written while training goes on. An earlier one is waited for."""
        began = time.perf_counter()
        self._watchdog.beat("save", step)
        self._wait()
        self._may_reserve = False  # the copies are in use from here on
        self._saver.start(step, facts, self._engine.state_files(copies=self._in_background))
        if not self._in_background:
            self._wait()
        stall = time.perf_counter() - began
        self._log.write("event", step, {"event": "saving", "stall_seconds": round(stall, 3)})

    def after_step(self) -> None:
        """Tells the user of a save that has ended meanwhile; after the first update, prepares for the first save."""
        if self._may_reserve and self._engine.updates:
            self._may_reserve = False
            self._engine.reserve_copies()
        self._tell(self._saver.finished())

    def settle(self, step: int, facts: dict) -> None:
        """Waits until this step is saved; CheckpointError if it cannot be."""
        self._watchdog.beat("save", step)
        self._wait()
        if self._saved_at < step:
            self.begin(step, facts)
            self._wait()
        if self._saved_at < step:
            raise CheckpointError(f"{self._run_dir} cannot be written: {self._problem}. Make room and start again: the "
                                  "newest whole checkpoint is kept")

    def _wait(self) -> None:
        self._tell(self._saver.wait(self._watchdog.alive))

    def _tell(self, outcome: SaveOutcome | None) -> None:
        if outcome is None:
            return
        event = {"path": str(outcome.path), "save_seconds": round(outcome.seconds, 3)}
        self._problem = outcome.problem
        if outcome.problem is None:
            self._saved_at = outcome.step
            self._log.write("event", outcome.step, {"event": "saved", **event})
            if outcome.not_removed is not None:
                self._say(f"warning: older checkpoints could not be removed: {outcome.not_removed}")
        else:
            self._log.write("event", outcome.step, {"event": "not saved", "problem": outcome.problem, **event})
            self._say(f"warning: no checkpoint of step {outcome.step}: {outcome.problem}. The checkpoints before it "
                      "are kept, and the next save tries again")
