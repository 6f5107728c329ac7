"""Checkpoints that are whole or not there: temporary folder, checksums, manifest written last, rename.

A folder `checkpoints/step-*` counts only if its manifest exists and every file it lists has its size and checksum.
Resuming takes the newest whole one and says aloud which damaged ones it passed. Writing happens in a thread of every
rank while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from trainer.checkpoint_folder import FOLDER, MANIFEST, by_step, name_of
from trainer.data.files import sync
from trainer.errors import CheckpointError, storage_failure
from trainer.launch import Ranks

_SLOWEST_WRITE = timedelta(hours=2)


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended. problem: None if the checkpoint is there, else why not; the earlier ones are then untouched.
    not_removed: why older checkpoints are still there, if they should not be. seconds: from the copy in memory to the
    end."""

    step: int
    path: Path
    problem: str | None
    not_removed: str | None
    seconds: float


class Saver:
    """Writes the checkpoints of one run, one at a time, in a thread of each rank.

    The threads agree with each other over a process group of their own, in the order of the phases: every rank's
    shards; fsync and checksums; the first rank's manifest; rename; removal of older checkpoints. A rank that cannot
    write makes all of them give up this save: what was written of it is removed.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, keep_last: int, keep_every: int):
        self._run_dir, self._folder, self._ranks = run_dir, run_dir / FOLDER, ranks
        self._keep_last, self._keep_every = keep_last, keep_every
        self._group = torch.distributed.new_group(backend="gloo", timeout=_SLOWEST_WRITE)
        self._thread: threading.Thread | None = None
        self._outcome: SaveOutcome | None = None
        self._broken: RuntimeError | None = None
        self._progress = 0

    def start(self, step: int, facts: dict, files: dict[str, object]) -> None:
        """Begins to write this rank's `files` (name -> state for torch.save), which must not change until the save
        has ended, and returns. `wait` for an earlier save first. A collective.

        facts: what the first rank puts into the manifest, beside the step and the list of files.
        """
        assert self._thread is None, "an earlier save has not been waited for"
        self._thread = threading.Thread(target=self._run, args=(step, facts, files), name="checkpoint", daemon=True)
        self._thread.start()

    def finished(self) -> SaveOutcome | None:
        """The outcome of a save that has ended since the last call; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            return self.wait()
        return None

    def wait(self, alive: Callable[[], None] = lambda: None) -> SaveOutcome | None:
        """Waits for the save in progress; its outcome, the same on all ranks, or None if there is none. Raises what
        the process group raised if a rank was lost meanwhile. alive: called whenever some more has been written."""
        if self._thread is None:
            return None
        seen = self._progress
        while self._thread.is_alive():
            self._thread.join(1.0)
            if self._progress != seen:
                seen = self._progress
                alive()
        self._thread = None
        if self._broken is not None:
            raise self._broken
        return self._outcome

    def _run(self, step: int, facts: dict, files: dict[str, object]) -> None:
        began = time.perf_counter()
        final = self._folder / name_of(step)
        temporary = final.with_name(f".writing-{final.name}")
        try:
            self._together(lambda: self._begin(temporary), first_only=True)
            self._together(lambda: _write_shards(temporary, files, self._go_on))
            shares = self._together(lambda: _seal(temporary, files, self._go_on))
            manifest = {"step": step, **facts, "files": {name: entry for share in shares for name, entry in
                                                         share.items()}}
            self._together(lambda: _commit(temporary, final, manifest), first_only=True)
            problem = None
        except _SaveFailed as failed:
            problem = str(failed)
            if self._ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
        except RuntimeError as error:  # the group broke: another rank is gone
            self._broken = error
            return
        not_removed = None
        if problem is None and self._ranks.first:
            try:
                _prune(self._run_dir, step, self._keep_last, self._keep_every)
            except OSError as error:
                not_removed = str(error)
        self._outcome = SaveOutcome(step, final, problem, not_removed, time.perf_counter() - began)

    def _together(self, action: Callable[[], object], first_only: bool = False) -> list:
        """Runs `action` on every rank, or only on the first, and returns what all got. If any rank failed,
        _SaveFailed says why, on all of them."""
        result, problem = None, None
        try:
            if self._ranks.first or not first_only:
                result = action()
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            problem = f"rank {self._ranks.rank}: {storage_failure(error) or f'{type(error).__name__}: {error}'}"
        answers: list = [None] * self._ranks.world
        torch.distributed.all_gather_object(answers, (result, problem), group=self._group)
        problems = [problem for _, problem in answers if problem is not None]
        if problems:
            raise _SaveFailed(problems[0])
        return [result for result, _ in answers]

    def _go_on(self) -> None:
        self._progress += 1

    def _begin(self, temporary: Path) -> None:
        for leftover in self._folder.glob(".writing-*"):  # of a save that was killed
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)


class _SaveFailed(Exception):
    """Some rank could not do its part of a save; says which and why."""


def _write_shards(temporary: Path, files: dict[str, object], go_on: Callable[[], None]) -> None:
    for name, state in files.items():
        go_on()
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, temporary / name)


def _seal(temporary: Path, files: Iterable[str], go_on: Callable[[], None]) -> dict[str, dict]:
    """Brings the files to the disk; what the manifest says of each."""
    entries = {}
    for name in files:
        go_on()
        sync(temporary / name)
        entries[name] = {"bytes": (temporary / name).stat().st_size, "sha256": _digest(temporary / name)}
    return entries


def _commit(temporary: Path, final: Path, manifest: dict) -> None:
    _write_manifest(temporary, manifest)
    _publish(temporary, final)


def seal(folder: Path, facts: dict) -> None:
    """Makes a folder that one process has written a checkpoint: its files' checksums and `facts` become its manifest.
    facts: what `Saver.start` is given, with the step."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    _write_manifest(folder, {**facts, "files": _seal(folder, names, lambda: None)})


def _write_manifest(temporary: Path, manifest: dict) -> None:
    for folder in {(temporary / name).parent for name in manifest["files"]}:
        sync(folder)
    text = json.dumps({**manifest, "sha256": _manifest_digest(manifest)}, indent=1, sort_keys=True)
    (temporary / MANIFEST).write_text(text)
    sync(temporary / MANIFEST)
    sync(temporary)


def _publish(temporary: Path, final: Path) -> None:
    if final.exists():  # a damaged one that was passed over, or one of an abandoned continuation
        _remove(final)
    temporary.rename(final)
    sync(final.parent)


def _prune(run_dir: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Removes older checkpoints, and later ones: this run has passed over them, so they are damaged or belong to an
    abandoned continuation."""
    steps = by_step(run_dir)
    older = [each for each in steps if each <= step]
    kept = {each for each in older if keep_every > 0 and each % keep_every == 0} | set(older[-keep_last:])
    for each, path in steps.items():
        if each > step or (keep_last > 0 and each not in kept):
            _remove(path)


def _remove(checkpoint: Path) -> None:
    """The manifest first, so that a half-removed checkpoint never counts."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def find(run_dir: Path, ranks: Ranks | None, say: Callable[[str], None],
         continuation: str | None = None) -> tuple[Path, dict] | None:
    """The newest whole checkpoint of a run and its manifest; `say` is told of each damaged one passed. With `ranks` a
    collective: they share the reading. continuation: only those whose manifest names it."""
    passed = []
    for folder in reversed(by_step(run_dir).values()):
        try:
            manifest = check(folder, ranks)
        except CheckpointError as damage:
            say(f"passing over a damaged checkpoint: {damage}")
            passed.append(folder.name)
            continue
        if continuation is not None and manifest.get("continuation") != continuation:
            continue
        if passed:
            say(f"the next save removes {', '.join(passed)}")
        return folder, manifest
    return None


def identity(folder: Path) -> str | None:
    """The checksum that a checkpoint's manifest gives of itself, by which it is known wherever it lies; None if there
    is none to be read."""
    try:
        return json.loads((folder / MANIFEST).read_text()).get("sha256")
    except (OSError, ValueError):
        return None


def check(folder: Path, ranks: Ranks | None = None) -> dict:
    """The manifest of a whole checkpoint; CheckpointError says what is wrong with one that is not. With `ranks` a
    collective: each reads a share of the files, and all get the same answer."""
    if ranks is None:
        return _checked(folder, 0, 1)
    manifest, damage = None, None
    try:
        manifest = _checked(folder, ranks.rank, ranks.world)
    except CheckpointError as error:
        damage = str(error)
    answers: list = [None] * ranks.world
    torch.distributed.all_gather_object(answers, damage, group=ranks.control)
    for answer in answers:
        if answer is not None:
            raise CheckpointError(answer)
    return manifest


def _checked(folder: Path, part: int, parts: int) -> dict:
    """The manifest, after all sizes and the checksums of every `parts`-th file from `part` on were found right."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder} has no readable {MANIFEST} ({error}): it was never completed") from error
    if manifest.pop("sha256", None) != _manifest_digest(manifest):
        raise CheckpointError(f"{folder / MANIFEST}: its checksum is not the one written")
    for number, (name, entry) in enumerate(sorted(manifest["files"].items())):
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            found = path.stat().st_size if path.is_file() else "no file"
            raise CheckpointError(f"{path}: {entry['bytes']} bytes were written, {found} found")
        if number % parts == part and _digest(path) != entry["sha256"]:
            raise CheckpointError(f"{path}: its checksum is not the one written")
    return manifest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
