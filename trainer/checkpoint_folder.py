"""Where a run keeps its checkpoints, and by which names. Whether one is whole, `trainer/checkpoint.py` finds out.

Without PyTorch, for tools that only look.
"""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
"""Written last: a checkpoint without it does not count."""


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def by_step(run_dir: Path) -> dict[int, Path]:
    """Step -> folder of its checkpoint, whole or not, ascending. A user's copies by other names do not count."""
    found = {path.name: path for path in (run_dir / FOLDER).glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)}
    return dict(sorted((int(name.removeprefix("step-")), path) for name, path in found.items()))


def completed(run_dir: Path) -> dict[int, Path]:
    """Those of `by_step` that have a manifest."""
    return {step: path for step, path in by_step(run_dir).items() if (path / MANIFEST).is_file()}
