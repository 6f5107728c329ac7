"""A rank that fails ends all ranks at once, with one line and one exit code.

It leaves its code in the process group's store, where a thread of every rank waits for it. Otherwise the others would
sit in a collective until a time limit, or end with a code of their own, which the launcher may see first.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from datetime import timedelta

import torch

_KEY = "trainer/failure"
_NOBODY = -1
_ANSWER_SECONDS = 5
_watcher: threading.Thread | None = None


def watch() -> None:
    """Starts this rank's thread. The process group must be there."""
    global _watcher
    if torch.distributed.get_world_size() > 1:
        _watcher = threading.Thread(target=_wait, args=(_store().clone(), torch.distributed.get_rank()), daemon=True)
        _watcher.start()


def dismiss() -> None:
    """Ends the threads of all ranks, before the store goes. Each rank calls it, after its last failure."""
    if _watcher is not None:
        _store().compare_set(_KEY, "", f"{_NOBODY} 0")
        _watcher.join(10)


def report(code: int) -> tuple[bool, int]:
    """(whether this rank is the one to say what went wrong, the exit code of all ranks). Before the group exists all
    ranks fail alike and the first one speaks; afterwards whichever fails first."""
    if not torch.distributed.is_initialized():
        return os.environ.get("RANK", "0") == "0", code
    rank = torch.distributed.get_rank()
    answers: list[bytes] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):  # the store went with the first rank
            answers.append(_store().compare_set(_KEY, "", f"{rank} {int(code)}"))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_SECONDS)  # the first rank, which keeps the store, may be frozen
    if not answers:
        return True, code
    speaker, agreed = map(int, answers[0].split())
    return speaker == rank, agreed


def leave(code: int) -> None:
    """Ends the process; the first rank, which keeps the store, once the others have had time to ask it."""
    joined = torch.distributed.is_initialized()
    if joined and torch.distributed.get_rank() == 0 and torch.distributed.get_world_size() > 1:
        time.sleep(1)
    os._exit(code)


def _wait(store: torch.distributed.Store, rank: int) -> None:
    try:
        store.wait([_KEY], timedelta(days=365))
        speaker, code = map(int, store.get(_KEY).split())
    except RuntimeError:  # the first rank was killed, and the store with it
        return
    if speaker not in (rank, _NOBODY):
        leave(code)


def _store() -> torch.distributed.Store:
    return torch.distributed.distributed_c10d._get_default_store()
