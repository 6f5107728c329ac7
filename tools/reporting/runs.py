"""What a run's folder holds, read for the report: every part may be missing, because a run may be young or unscored."""

from __future__ import annotations

import json
import shlex
import tomllib
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from trainer.checkpoint_folder import MANIFEST, completed
from trainer.errors import CheckpointError, DataError

_NO_PARAMETER = "prior_count_V"  # the unigram counts, which the model's file holds beside its parameters


@dataclass(frozen=True)
class Generations:
    """One file of generated texts: `records` as tools/generate.py writes them, `scores` by system where they are."""

    path: Path
    records: list[dict]
    scores: dict[str, dict] | None


@dataclass(frozen=True)
class Run:
    """A run's folder as it stands on disk. name: what the report calls it; config, deepspeed, environment, status:
    the files of these names, {} where they are missing."""

    path: Path
    name: str
    lines: list[dict]
    config: dict
    deepspeed: dict
    environment: dict
    status: dict
    topology: dict
    generations: list[Generations]
    trace: dict | None

    def of_kind(self, kind: str) -> list[dict]:
        """metrics.jsonl's lines of one kind: train, eval or event."""
        return [line for line in self.lines if line["kind"] == kind]

    def curve(self, key: str, kind: str = "train") -> list[tuple[float, float]]:
        """(step, value) of every line that has a finite value."""
        return [(line["step"], line[key]) for line in self.of_kind(kind)
                if isinstance(line.get(key), int | float) and isfinite(line[key])]

    @property
    def last_evaluation(self) -> dict | None:
        return next((line for line in reversed(self.of_kind("eval")) if "by_level" in line), None)

    @property
    def steps(self) -> int:
        """Steps done, as far as the files say."""
        return max([self.status.get("step", 0), *(line["step"] for line in self.lines)])

    @property
    def seconds(self) -> float:
        """Wall-clock time up to the last line of metrics; a resumed run counts from 0 again."""
        total = last = 0.0
        for _, seconds in self.curve("seconds"):
            total += last if seconds < last else 0.0
            last = seconds
        return total + last

    @property
    def command(self) -> str:
        """What a launcher started: from the program on, without what the launcher put in."""
        words = self.environment.get("command", [])
        program = next((index for index, word in enumerate(words) if word.endswith("run.py")), 0)
        return shlex.join(word for word in words[program:] if not word.startswith("--local_rank"))

    @cached_property
    def parameters(self) -> int | None:
        """Of the finished model, from the header of its file; None while there is none."""
        path = self.path / "model" / "model.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, "numpy") as file:
                shapes = [file.get_slice(name).get_shape() for name in file.keys() if name != _NO_PARAMETER]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        return sum(prod(shape) for shape in shapes)


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs, named by their folders or, where these are alike, by the paths as given."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(path: Path, name: str) -> Run:
    """CheckpointError where the folder is no run's; DataError where one of its files is damaged."""
    if not (path / "config" / "run.toml").is_file() and not (path / "metrics.jsonl").is_file():
        raise CheckpointError(f"{path} is no run's folder: it has neither config/run.toml nor metrics.jsonl")
    checkpoints = list(completed(path).values())
    trace = _json(path / "generations" / "trace.json")
    generated = sorted((path / "generations").glob("*.jsonl"))
    return Run(path=path, name=name, lines=_lines(path / "metrics.jsonl", ("kind", "step")),
               config=_toml(path / "config" / "run.toml"), deepspeed=_json(path / "config" / "deepspeed.json"),
               environment=_json(path / "config" / "environment.json"), status=_json(path / "status.json"),
               topology=_json(checkpoints[-1] / MANIFEST).get("topology", {}) if checkpoints else {},
               generations=[Generations(file, _lines(file, ("document", "text")),
                                        _json(file.with_suffix(".scores.json")) or None) for file in generated],
               trace=trace if trace.get("texts") else None)


def _lines(path: Path, needed: tuple[str, ...]) -> list[dict]:
    """JSON lines, [] without the file. What follows the last line's end is half-written: the file may still grow."""
    records = []
    for number, line in enumerate(_text(path).split("\n")[:-1], 1):  # splitlines() also splits inside of texts
        try:
            record = json.loads(line)
            missing = set(needed) - record.keys()
        except (json.JSONDecodeError, AttributeError) as error:
            raise DataError(f"{path}:{number}: is no JSON object ({error})") from error
        if missing:
            raise DataError(f"{path}:{number}: has no {', '.join(sorted(missing))}")
        records.append(record)
    return records


def _json(path: Path) -> dict:
    try:
        return json.loads(_text(path) or "{}")
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: is no JSON ({error})") from error


def _toml(path: Path) -> dict:
    try:
        return tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path}: is no TOML ({error})") from error


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
