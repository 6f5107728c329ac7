"""What a benchmark finds, in one form for all: lines for the reader, and JSON for the page (`benchmarks/page.py`).

    {"part", "about", "command", "measured", "commit", "code", "machine", "versions",
     "rows": [{"key", "what", "value", "unit", "low", "high", "goal"}],
     "tables": [{"title", "columns", "rows"}],
     "plots": [{"name", "title", "x", "y", "curves": {name: [[x, y], ...]}}]}

A row is one figure: a median with the least and greatest of its repeats, null where it was taken once, and the goal
that it is held against, as words. `code` is a hash of the files that were measured.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.goals import GOAL_OF, Goal
from benchmarks.timing import Spread
from trainer.hardware import processor

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "deepspeed", "transformers", "flash-attn", "megablocks")


def parser(about: str) -> argparse.ArgumentParser:
    """For a benchmark whose module says `about`; its own options are added to it."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write what is found there as well")
    return made


class Report:
    """Prints each finding as it comes, and keeps it. part: the benchmark's name; about: its module's docstring."""

    def __init__(self, part: str, about: str):
        self.part = part
        self.found = {"part": part, "about": about, **origin(part), "rows": [], "tables": [], "plots": []}

    def row(self, key: str, what: str, found: Spread | float, unit: str = "x") -> None:
        """key: after the part's name and a dot, unique in the part."""
        spread = found if isinstance(found, Spread) else Spread(found, *2 * [None])
        goal = GOAL_OF.get(f"{self.part}.{key}")
        self.found["rows"].append({"key": f"{self.part}.{key}", "what": what, "value": spread.value, "unit": unit,
                                   "low": spread.low, "high": spread.high, "goal": goal and goal_text(goal)})
        verdict = f"; goal: {goal_text(goal)}, {'reached' if goal.reached(spread.value) else 'MISSED'}" if goal else ""
        print(f"{what}: {figure(*spread, unit)}{verdict}", flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        cells = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
        self.found["tables"].append({"title": title, "columns": list(columns), "rows": cells})
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        print(f"\n{title}")
        for row in (columns, *cells):
            print("  ".join(cell.ljust(width) if index == 0 else cell.rjust(width)
                            for index, (cell, width) in enumerate(zip(row, widths, strict=True))), flush=True)
        print()

    def plot(self, name: str, title: str, x: str, y: str,
             curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
        """name: of the picture's file."""
        self.found["plots"].append({"name": name, "title": title, "x": x, "y": y, "curves": dict(curves)})

    def write(self, path: Path | None) -> None:
        """As JSON, all at once: an interrupted benchmark leaves what was there."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(self.found, indent=1) + "\n")
            unfinished.replace(path)


def number(value: float) -> str:
    """Three significant digits, all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def figure(value: float, low: float | None, high: float | None, unit: str) -> str:
    """`3.4x (3.2 to 3.5)`."""
    mark = unit if unit in ("x", "%", "") else f" {unit}"
    spread = "" if low is None else f" ({number(low)} to {number(high)})"
    return f"{number(value)}{mark}{spread}"


def goal_text(goal: Goal) -> str:
    return f"{'at most' if goal.at_most else 'at least'} {figure(goal.bound, None, None, goal.unit)}"


def origin(part: str) -> dict:
    """Where figures come from: command, time, code, machine, packages."""
    words = [f"benchmarks/{Path(sys.argv[0]).name}",
             *(word for before, word in pairwise(sys.argv) if not word.startswith("--json") and before != "--json")]
    return {"command": shlex.join(["python", *words]),
            "measured": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": _git("rev-parse", "--short", "HEAD"), "code": fingerprint(part), "machine": machine(),
            "versions": {"Python": platform.python_version(), **{name: version for name in _PACKAGES
                                                                 if (version := _version(name))}}}


_TRAINED = ("ds_configs/*.json", "data/proposals/*.gz")
_ALSO = {"step": ("benchmarks/original.py",), "resume": ("tests/trainer/*.py",), "balance": _TRAINED, "data": _TRAINED,
         "scaling": _TRAINED}
"""Part -> what else its figures depend on."""


def fingerprint(part: str) -> str:
    """Hash of what a part's figures depend on: model, trainer, the part itself, what all share, and `_ALSO`."""
    files = [path for room in ("model", "trainer") for path in sorted((ROOT / room).rglob("*.py"))]
    files += [ROOT / "benchmarks" / f"{name}.py" for name in (part, "timing")]
    files += [ROOT / "requirements.txt"]
    files += [path for pattern in _ALSO.get(part, ()) for path in sorted(ROOT.glob(pattern))]
    digest = hashlib.sha256()
    for path in filter(Path.is_file, files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def machine() -> str:
    """`AMD EPYC 9R14, 2 cores, 31 GiB`, and the GPU if there is one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB{gpu}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """What git says; empty where there is none."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
