"""Programs that run side by side, one thread each, and end together."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.ablating.documents import ROOT

_GRACE = 60.0
"""Seconds that a program may take to save itself."""


class Interrupted(Exception):
    """The program was ended because all were."""


class Children:
    """Starts programs and waits for them, from any number of threads; `end` ends all of them for good."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._lock, self._ended = threading.Lock(), False

    def run(self, command: Sequence[str], log: Path, enough: Callable[[], bool] = lambda: False) -> int:
        """The exit code of a program whose output is added to `log`; 0 if it was killed because of it there was
        `enough`. Raises Interrupted."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with log.open("a") as output:
            with self._lock:
                if self._ended:
                    raise Interrupted
                # A group of its own: Ctrl-C is for this program, which tells its children.
                child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output,
                                         stdin=subprocess.DEVNULL, start_new_session=True)
                self._running.add(child)
            try:
                while child.poll() is None:
                    if enough():
                        child.kill()
                        child.wait()
                        return 0
                    time.sleep(0.2)
            finally:
                with self._lock:
                    self._running.discard(child)
        if self._ended:
            raise Interrupted
        return child.returncode

    def end(self) -> None:
        """Asks all programs to save and leave, and kills those that do not."""
        with self._lock:
            self._ended = True
            running = list(self._running)
        for child in running:
            child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        while any(child.poll() is None for child in running) and time.monotonic() < deadline:
            time.sleep(0.1)
        for child in running:
            if child.poll() is None:
                child.kill()
