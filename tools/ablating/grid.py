"""A grid file: what is compared, on which documents, with which budget. Its keys and their meaning are below.

A key of `settings` is one of the run configuration (`trainer/run.py --help_config`), dotted or in tables. For one run
they come together as base < data set < cell; `documents`, seeds and budget may be overridden on the command line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from model.errors import ConfigError
from trainer.config import RunConfig
from trainer.config_load import load
from trainer.presets import DEFAULT_PRESET

MEASURED = {"cross_entropy": "cross-entropy", "token_accuracy": "token accuracy",
            "embedding_error": "embedding error",
            "expert_variation": "CV of experts", "position_routing": "bits of position",
            "minutes": "minutes", "steps": "steps", "tokens": "tokens trained", "parameters": "parameters",
            "memory_gb": "GB, training", "generating_gb": "GB, generating", "seconds_per_text": "s a text"}
"""What is measured beside the scores of texts: name -> head of its column."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """`[data.NAME]`: train, valid and test, each a .jsonl.gz (or .jsonl) of objects with src and trg."""

    folder: str = ""
    """Below --data, or below data/ of the repository; by default its name."""
    origin: str = ""
    """Where a user gets it who does not have it."""
    form: str = "text"
    """facts: sources are `name[Aromi], food[Chinese]`; texts are lower-cased and their punctuation is set apart."""
    task: str = "text"
    """text, answers or labels, as in tools/evaluate.py."""
    settings: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """`[[cells]]`: one way to train."""

    name: str = ""
    preset: str = ""
    recipe: str = ""
    settings: dict = field(default_factory=dict)
    samplers: list[str] = field(default_factory=list)
    """Names of those of the grid's samplers that are tried on it; empty for all."""
    axes: dict = field(default_factory=dict)
    """Keys of the run configuration with a list of values each: instead of one, a cell for every combination."""
    curve: str | None = None
    """Its name in the key of a plot, by default its own; cells of one name are one curve. Of axes: the name with all
    values but those of the first axis."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """`[[samplers]]`: one way to generate from the trained model. Without any, that of the cell's configuration."""

    name: str = ""
    settings: dict = field(default_factory=dict)
    """Keys of the section `sample`, without its name."""
    seeds: int = 0
    """Only on the first so many seeds' models; 0: on all."""
    axes: dict = field(default_factory=dict)
    """As for a cell."""
    curve: str | None = None
    """As for a cell; the two are joined."""
    family: str = ""
    """Filled in: the name before axes made several of it, which cells know it by."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """`[[plots]]`: a measure of every row over a key of its configuration."""

    y: str = ""
    x: str = ""
    """A key of the run configuration, or something that is measured."""
    title: str = ""
    logarithmic: bool = False
    """The x axis."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The top of the file."""

    title: str = ""
    question: str = ""
    """What it answers, in one sentence."""
    preset: str = DEFAULT_PRESET
    recipe: str = ""
    settings: dict = field(default_factory=dict)
    data: dict[str, DataSet] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    samplers: list[Sampler] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    minutes: float = 0.0
    """Training time of each run: minutes of its one thread on a CPU, of the clock on a GPU."""
    tokens: int = 0
    """Instead of minutes: tokens that each run trains on, sources and filler included."""
    documents: int = 100
    """Test documents of each set, spread evenly; those of one source are one with several references."""
    columns: list[str] = field(default_factory=list)
    """Of the table; by default the usual ones of the task."""
    plots: list[Plot] = field(default_factory=list)

    def runs(self) -> Iterator[Run]:
        """Every run in the order in which they are made: all cells with the first seed, then with the next."""
        for seed in self.seeds:
            for name, data in self.data.items():
                for cell in self.cells:
                    yield Run(self, name, data, cell, seed)


@dataclass(frozen=True)
class Run:
    """One training of a grid."""

    grid: Grid
    data_name: str
    data: DataSet
    cell: Cell
    seed: int

    def __str__(self) -> str:
        return f"{self.data_name}, {self.cell.name}, seed {self.seed}"

    @property
    def overrides(self) -> dict[str, object]:
        """Dotted keys with their values, as the grid says."""
        return {**flat(self.grid.settings), **flat(self.data.settings), **flat(self.cell.settings)}

    def config(self, more: dict[str, object] | None = None) -> RunConfig:
        """The resolved configuration, apart from what the tool decides; ConfigError names the cell."""
        cell = self.cell
        try:
            return load(cell.preset or self.grid.preset, cell.recipe or self.grid.recipe,
                        overrides=as_overrides({**self.overrides, **(more or {})}))
        except ConfigError as error:
            raise ConfigError(error.key, f"{error.problem} [{self.data_name}, {cell.name}]") from error

    @property
    def samplers(self) -> list[Sampler]:
        """Those that are tried on this run's model."""
        nth = self.grid.seeds.index(self.seed)
        return [each for each in self.grid.samplers if (not self.cell.samplers or each.family in self.cell.samplers)
                and (not each.seeds or nth < each.seeds)]


def flat(settings: dict, prefix: str = "") -> dict[str, object]:
    """Nested tables as dotted keys."""
    found = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def file_name(name: str) -> str:
    """A name as a file's: readable, and safe."""
    return re.sub(r"[^\w.]+", "-", name).strip("-") or "default"


def as_overrides(settings: dict[str, object]) -> list[str]:
    """For --set: the values in TOML's notation, which JSON's is a part of."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
