"""A grid file: what is compared, on which documents, with which budget. Its keys and their meaning are below.

A key of `settings` is one of the run configuration (`trainer/run.py --help_config`), dotted or in tables. For one run
they come together as base < data set < cell; `documents`, seeds and budget may be overridden on the command line.
"""

from __future__ import annotations

import difflib
import itertools
import json
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import get_type_hints

from model.errors import ConfigError
from tools.scoring.columns import COLUMNS
from tools.scoring.systems import TASKS
from trainer.config import RunConfig
from trainer.config_load import load
from trainer.presets import DEFAULT_PRESET, PRESETS, RECIPES

FORMS = ("text", "facts")
MEASURED = {"cross_entropy": "cross-entropy", "token_accuracy": "token accuracy",
            "embedding_error": "embedding error",
            "minutes": "minutes", "steps": "steps", "tokens": "tokens trained", "parameters": "parameters",
            "memory_gb": "GB", "seconds_per_text": "s a text"}
"""What is measured beside the scores of texts: name -> head of its column."""
_OURS = {"data.train": "the grid's [data] names the documents", "data.valid": "the grid's [data] names the documents",
         "data.test": "the grid's [data] names the documents", "train.steps": "the budget decides it",
         "train.seed": "`seeds` decides it", "train.max_minutes": "the budget decides it",
         "train.log_every": "the tool decides it", "train.eval_every": "the tool evaluates at the end",
         "train.sample_every": "the tool generates at the end", "train.save_every": "the tool decides it",
         "train.keep_last": "the tool decides it"}


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
    curve: str | None = None
    """Its name in the key of a plot, by default its own; cells of one name are one curve."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """`[[samplers]]`: one way to generate from the trained model. Without any, that of the cell's configuration."""

    name: str = ""
    settings: dict = field(default_factory=dict)
    """Keys of the section `sample`, without its name."""
    seeds: int = 0
    """Only on the first so many seeds' models; 0: on all."""
    curve: str | None = None
    """As for a cell; the two are joined."""


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
    axes: dict[str, list] = field(default_factory=dict)
    """Dotted keys of the run configuration with a list of values each: a cell for every combination, beside `cells`."""
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
        return [each for each in self.grid.samplers if (not self.cell.samplers or each.name in self.cell.samplers)
                and (not each.seeds or nth < each.seeds)]


def flat(settings: dict, prefix: str = "") -> dict[str, object]:
    """Nested tables as dotted keys."""
    found = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def as_overrides(settings: dict[str, object]) -> list[str]:
    """For --set: the values in TOML's notation, which JSON's is a part of."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def read_grid(path: Path, **given: object) -> Grid:
    """The grid with the values of the command line (those that are not None) in place of its own, checked; every
    problem is a ConfigError. `seeds` may be given as a number: the first so many."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("GRID", f"{path} is not TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("GRID", f"cannot read {path} ({error})") from error
    grid = _build(Grid, values, "")
    if given.get("minutes") is not None:
        grid = replace(grid, minutes=given["minutes"], tokens=0)
    if given.get("tokens") is not None:
        grid = replace(grid, tokens=given["tokens"], minutes=0.0)
    if given.get("seeds") is not None:
        if not 1 <= given["seeds"] <= len(grid.seeds):
            raise ConfigError("--seeds", f"is {given['seeds']}, but {path} has {len(grid.seeds)}: give fewer, or add "
                              "some to its `seeds`")
        grid = replace(grid, seeds=grid.seeds[:given["seeds"]])
    if given.get("documents") is not None:
        grid = replace(grid, documents=given["documents"])
    if given.get("data"):
        _known("--sets", given["data"], grid.data)
        grid = replace(grid, data={name: grid.data[name] for name in given["data"]})
    grid = replace(grid, cells=[*grid.cells, *_product(grid.axes)], samplers=grid.samplers or [Sampler(name="")])
    _check(grid)
    return grid


def _product(axes: dict[str, list]) -> list[Cell]:
    """A cell for every combination."""
    if not axes:
        return []
    leaves = [key.rpartition(".")[2] for key in axes]
    return [Cell(name=", ".join(f"{leaf} {value}" for leaf, value in zip(leaves, values, strict=True)),
                 curve=", ".join(f"{leaf} {value}" for leaf, value in list(zip(leaves, values, strict=True))[1:]),
                 settings=dict(zip(axes, values, strict=True)))
            for values in itertools.product(*axes.values())]


def _build(kind: type, values: object, where: str) -> object:
    """A dataclass of this file from the tables that stand for it."""
    if not isinstance(values, dict):
        raise ConfigError(where or "GRID", f"must be a table, not {values!r}")
    hints, made = get_type_hints(kind), {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else key
        _known(name, [key], hints)
        if name == "data":
            made[key] = {each: _build(DataSet, table, f"data.{each}") for each, table in _table(name, value).items()}
        elif where == "" and key in ("cells", "samplers", "plots"):
            of = {"cells": Cell, "samplers": Sampler, "plots": Plot}[key]
            made[key] = [_build(of, table, f"{key}[{place}]") for place, table in enumerate(_list(name, value))]
        elif key == "axes":
            made[key] = {axis: _list(f"axes.{axis}", points) for axis, points in flat(_table(name, value)).items()}
        else:
            made[key] = _typed(name, value, kind, key)
    return kind(**made)


def _typed(name: str, value: object, kind: type, key: str) -> object:
    """The value, if it is of the type of the field's default."""
    item = next(each for each in fields(kind) if each.name == key)
    default = item.default if item.default is not MISSING else item.default_factory()
    expected = str if default is None else type(default)
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise ConfigError(name, f"must be of the kind of {expected().__repr__()}, not {value!r}")
    return value


def _table(name: str, value: object) -> dict:
    if not isinstance(value, dict) or not value:
        raise ConfigError(name, f"must be a table that holds something, not {value!r}")
    return value


def _list(name: str, value: object) -> list:
    if not isinstance(value, list) or not value:
        raise ConfigError(name, f"must be a list that holds something, not {value!r}")
    return value


def _known(name: str, keys: list[str], known: object) -> None:
    """ConfigError for the first key that is not among those known, with what it may have been meant to be."""
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(known)}"
            raise ConfigError(name, f"{key!r} is not known; {hint}")


def _check(grid: Grid) -> None:
    """Refuses what cannot work, every cell's configuration included."""
    def need(ok: bool, key: str, problem: str) -> None:
        if not ok:
            raise ConfigError(key, problem)

    need(bool(grid.title), "title", "is missing: say what is compared")
    need(bool(grid.data), "data", "is missing: name at least one set, as [data.NAME]")
    need(bool(grid.cells), "cells", "is missing: give [[cells]], or [axes]")
    need((grid.minutes > 0) != (grid.tokens > 0), "minutes", "or tokens, one of the two, must be positive: it is the "
         "budget of each run")
    need(grid.documents >= 2, "documents", f"must be 2 or more, not {grid.documents}")
    need(bool(grid.seeds) and all(type(seed) is int and seed >= 0 for seed in grid.seeds), "seeds",
         f"must be a list of whole numbers, 0 or more, not {grid.seeds}")
    need(len(set(grid.seeds)) == len(grid.seeds), "seeds", f"repeats one: {grid.seeds}")
    for place, sampler in enumerate(grid.samplers):
        _known(f"samplers[{place}].settings", list(sampler.settings), load().sample.__dataclass_fields__)
    for kind, named in (("cells", grid.cells), ("samplers", grid.samplers)):
        names = [each.name for each in named]
        need(len(set(names)) == len(names), kind, f"names are needed that differ, not {names}")
        need((kind == "samplers" and len(names) == 1) or all(names), kind, f"each needs a name: {names}")
    _known("preset", [grid.preset], PRESETS)
    for data in grid.data.values():
        _known("data.form", [data.form], FORMS)
        _known("data.task", [data.task], TASKS)
    for cell in grid.cells:
        _known("cells.samplers", cell.samplers, [each.name for each in grid.samplers])
        _known("cells.preset", [cell.preset] if cell.preset else [], PRESETS)
        _known("cells.recipe", [cell.recipe] if cell.recipe else [], RECIPES)
    measures = {**COLUMNS, **MEASURED}
    _known("columns", grid.columns, measures)
    for place, plot in enumerate(grid.plots):
        _known(f"plots[{place}].y", [plot.y], measures)
        need(bool(plot.x), f"plots[{place}].x", "is missing: a key of the run configuration, or a measure")
    for run in grid.runs():
        for key in run.overrides:
            need(key not in _OURS, key, f"cannot be set in a grid: {_OURS.get(key)}")
        for sampler in run.samplers:
            run.config({f"sample.{key}": value for key, value in sampler.settings.items()})
