"""Checkpoints that are whole or not there: temporary folder, checksums, manifest written last, rename.

A folder `checkpoints/step-*` counts only if its manifest exists and every file it lists has its size and checksum.
Resuming takes the newest whole one and says aloud which damaged ones it passed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch

from trainer.data.files import sync
from trainer.errors import CheckpointError
from trainer.launch import Ranks

MANIFEST = "manifest.json"


def save(run_dir: Path, step: int, facts: dict, write, ranks: Ranks, keep_last: int, keep_every: int) -> Path:
    """Calls `write(folder)` on all ranks and commits what they wrote. A collective.

    facts: what a resume must agree with (topology, configuration digests); kept in the manifest.
    """
    final = run_dir / "checkpoints" / f"step-{step:08d}"
    temporary = final.with_name(f".writing-{final.name}")
    if ranks.first:
        for leftover in final.parent.glob(".writing-*"):  # of a save that was killed
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    torch.distributed.barrier()
    write(temporary)
    torch.distributed.barrier()
    names = sorted(str(p.relative_to(temporary)) for p in temporary.rglob("*") if p.is_file())
    mine = {name: _seal(temporary / name) for name in names[ranks.rank::ranks.world]}
    shares: list[dict] = [{} for _ in range(ranks.world)]
    torch.distributed.all_gather_object(shares, mine)
    if ranks.first:
        manifest = {"step": step, **facts, "files": {n: e for share in shares for n, e in share.items()}}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        sync(temporary / MANIFEST)
        if final.exists():  # a damaged one that was passed over
            shutil.rmtree(final)
        sync(temporary)
        temporary.rename(final)
        sync(final.parent)
        _prune(run_dir, keep_last, keep_every)
    torch.distributed.barrier()
    return final


def find(run_dir: Path, say) -> tuple[Path, dict] | None:
    """The newest whole checkpoint of a run and its manifest; `say` is told of each damaged one passed."""
    for folder in sorted((run_dir / "checkpoints").glob("step-*"), reverse=True):
        try:
            return folder, check(folder)
        except CheckpointError as damage:
            say(f"passing over a damaged checkpoint: {damage}")
    return None


def check(folder: Path) -> dict:
    """The manifest of a whole checkpoint; CheckpointError says what is wrong with one that is not."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder} has no readable {MANIFEST} ({error}): it was never completed") from error
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            found = path.stat().st_size if path.is_file() else "no file"
            raise CheckpointError(f"{path}: {entry['bytes']} bytes were written, {found} found")
        if _digest(path) != entry["sha256"]:
            raise CheckpointError(f"{path}: its checksum is not the one written")
    return manifest


def _prune(run_dir: Path, keep_last: int, keep_every: int) -> None:
    """Removes older checkpoints, the manifest first, so that a half-removed one never counts."""
    folders = sorted((run_dir / "checkpoints").glob("step-*"))
    for folder in folders[:-keep_last] if keep_last > 0 else []:
        if keep_every > 0 and int(folder.name.removeprefix("step-")) % keep_every == 0:
            continue
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _seal(path: Path) -> dict:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
