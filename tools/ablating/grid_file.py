"""Reads a grid file, puts the command line's values in, and refuses what cannot work before anything runs."""

from __future__ import annotations

import difflib
import itertools
import tomllib
from collections.abc import Collection
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import get_type_hints

from model.errors import ConfigError
from tools.ablating.grid import MEASURED, Cell, DataSet, Grid, Plot, Sampler, file_name, flat
from tools.scoring.columns import COLUMNS
from tools.scoring.systems import TASKS
from trainer.config import SampleConfig
from trainer.presets import PRESETS, RECIPES

FORMS = ("text", "facts")
_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list",
          dict: "a table"}
_OURS = {"data.train": "the grid's [data] names the documents", "data.valid": "the grid's [data] names the documents",
         "data.test": "the grid's [data] names the documents", "train.steps": "the budget decides it",
         "train.seed": "`seeds` decides it", "train.max_minutes": "the budget decides it",
         "train.log_every": "the tool decides it", "train.eval_every": "the tool evaluates at the end",
         "train.sample_every": "the tool generates at the end", "train.save_every": "the tool decides it",
         "train.keep_last": "the tool decides it"}


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
    samplers = [replace(each, family=each.name) for each in grid.samplers or [Sampler()]]
    grid = replace(grid, cells=_expanded(grid.cells), samplers=_expanded(samplers))
    _check(grid)
    return grid


def _expanded(items: list) -> list:
    """Cells or samplers, those with axes replaced by one for every combination of values."""
    made = []
    for item in items:
        axes = {key: _list(f"axes.{key}", values) for key, values in flat(item.axes).items()}
        for values in itertools.product(*axes.values()):
            parts = [f"{key.rpartition('.')[2]} {value}" for key, value in zip(axes, values, strict=True)]
            curve = ", ".join(filter(None, [item.name, *parts[1:]])) if axes and item.curve is None else item.curve
            made.append(replace(item, name=", ".join(filter(None, [item.name, *parts])), curve=curve, axes={},
                                settings={**flat(item.settings), **dict(zip(axes, values, strict=True))}))
    return made


def _build(kind: type, values: object, where: str) -> object:
    """A dataclass of this file from the tables that stand for it."""
    if not isinstance(values, dict):
        raise ConfigError(where or "GRID", f"must be a table, not {values!r}")
    known, made = [each for each in get_type_hints(kind) if each != "family"], {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else key
        _known(name, [key], known)
        if name == "data":
            made[key] = {each: _build(DataSet, table, f"data.{each}") for each, table in _table(name, value).items()}
        elif where == "" and key in ("cells", "samplers", "plots"):
            of = {"cells": Cell, "samplers": Sampler, "plots": Plot}[key]
            made[key] = [_build(of, table, f"{key}[{place}]") for place, table in enumerate(_list(name, value))]
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
        raise ConfigError(name, f"must be {_KINDS[expected]}, not {value!r}")
    return value


def _table(name: str, value: object) -> dict:
    if not isinstance(value, dict) or not value:
        raise ConfigError(name, f"must be a table that holds something, not {value!r}")
    return value


def _list(name: str, value: object) -> list:
    if not isinstance(value, list) or not value:
        raise ConfigError(name, f"must be a list that holds something, not {value!r}")
    return value


def _known(name: str, keys: Collection[str], known: Collection[str]) -> None:
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
    need(bool(grid.cells), "cells", "is missing: give at least one, as [[cells]]")
    need((grid.minutes > 0) != (grid.tokens > 0), "minutes", "or tokens, one of the two, must be positive: it is the "
         "budget of each run")
    need(grid.documents >= 2, "documents", f"must be 2 or more, not {grid.documents}")
    need(bool(grid.seeds) and all(type(seed) is int and seed >= 0 for seed in grid.seeds), "seeds",
         f"must be a list of whole numbers, 0 or more, not {grid.seeds}")
    need(len(set(grid.seeds)) == len(grid.seeds), "seeds", f"repeats one: {grid.seeds}")
    for place, sampler in enumerate(grid.samplers):
        _known(f"samplers[{place}].settings", list(sampler.settings), [each.name for each in fields(SampleConfig)])
    for kind, named in (("cells", grid.cells), ("samplers", grid.samplers)):
        names = [each.name for each in named]
        need(len(set(map(file_name, names))) == len(names), kind, "names are needed that differ in letters and "
             f"digits, not {names}")
        need((kind == "samplers" and len(names) == 1) or all(names), kind, f"each needs a name: {names}")
    _known("preset", [grid.preset], PRESETS)
    for data in grid.data.values():
        _known("data.form", [data.form], FORMS)
        _known("data.task", [data.task], TASKS)
    for cell in grid.cells:
        _known("cells.samplers", cell.samplers, dict.fromkeys(each.family for each in grid.samplers))
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
