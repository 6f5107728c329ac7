"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from trainer.errors import RunError


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds `path`.lock for as long as the block runs. Yields False where the file system has no locks:
    whoever builds something then builds it twice, harmlessly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def build_once(final: Path, is_whole: Callable[[Path], bool], build: Callable[[Path], None], *,
               resumable: bool = False) -> bool:
    """Makes `final` (a file or a folder) by `build(temporary path)` and a rename, unless it is there, whole.

    Safe to interrupt at any point, and safe when several processes ask at once: one builds, the others wait
    for it. What an interrupted build left on this host is removed; or, with `resumable`, given to the next build, which
    must put files into it whole, and the same ones each time: without common locks two hosts may do it at once. Where
    the data is at fault (RunError), nothing is left. Returns whether this call built it.
    """
    if is_whole(final):
        return False
    with locked(final) as alone:
        if is_whole(final):
            return False
        prefix = f"{final.name}.tmp-{socket.gethostname()}-"
        if alone:
            for leftover in final.parent.glob(f"{prefix}*"):
                _remove(leftover)
        resumable = resumable and alone
        temporary = final.with_name(f"{final.name}.partial" if resumable else prefix + uuid.uuid4().hex[:12])
        try:
            build(temporary)
            _move(temporary, final, is_whole)
        except BaseException as error:
            if not resumable or isinstance(error, RunError):
                _remove(temporary)
            if not (isinstance(error, OSError) and is_whole(final)):  # otherwise another host was faster
                raise
    return True


def _move(temporary: Path, final: Path, is_whole: Callable[[Path], bool]) -> None:
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    if final.exists() and not is_whole(final):
        _remove(final)
    try:
        os.rename(temporary, final)
    except OSError:
        if not is_whole(final):  # otherwise another host was faster, without a common lock
            raise
        _remove(temporary)
    sync(final.parent)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file that is there whole or not at all; two hosts may write the same one at once."""
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")
    with open(temporary, "wb") as handle:
        write(handle)
    sync(temporary)
    os.replace(temporary, path)


def write_text_whole(path: Path, text: str) -> None:
    """`write_whole` of a text, in UTF-8."""
    write_whole(path, lambda handle: handle.write(text.encode()))


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
