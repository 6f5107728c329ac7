"""Puts the run configuration together, preset < recipe < file < --set; strict types, no unknown keys."""

from __future__ import annotations

import difflib
import math
import tomllib
import types
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from functools import reduce
from pathlib import Path
from typing import NamedTuple, Union, get_args, get_origin, get_type_hints

from model.errors import ConfigError
from trainer.config import RunConfig, describe
from trainer.ds_config import KEYS as DEEPSPEED_KEYS
from trainer.ds_config import read_json
from trainer.presets import DEFAULT_PRESET, PRESETS, RECIPES


class _Layer(NamedTuple):
    values: dict
    origin: str
    """Where the values were written, for error messages."""


def load(preset: str = "", recipe: str = "", file: str | Path | None = None,
         overrides: Sequence[str] = ()) -> RunConfig:
    """The resolved and validated run configuration; every problem is a ConfigError.

    preset, recipe: names in `trainer/presets.py`; empty: as the file says at its top, else DEFAULT_PRESET and
    the preset's own recipe. file: .toml or .json. overrides: "dotted.key=value", the value in TOML's
    notation; text needs no quotes. """
    values = _read(Path(file)) if file else {}
    preset = _choice("preset", PRESETS, preset, values.pop("preset", ""), file) or DEFAULT_PRESET
    start = dict(PRESETS[preset])
    default_recipe = start.pop("recipe")
    recipe = _choice("recipe", RECIPES, recipe, values.pop("recipe", ""), file) or default_recipe

    bottom = [_Layer(start, f"preset {preset}")]
    top = [_Layer(values, str(file)), *(_Layer(_parse_override(text), "--set") for text in overrides)]
    # What a recipe derives from sizes must hold for the sizes that the file and --set decide.
    sizes = reduce(_apply_layer, [*bottom, *top], RunConfig(preset=preset, recipe=recipe))
    chosen = _Layer(RECIPES[recipe](sizes), f"recipe {recipe}")
    config = reduce(_apply_layer, [*bottom, chosen, *top], RunConfig(preset=preset, recipe=recipe))
    config.validate()
    return config


def from_dict(values: dict, origin: str) -> RunConfig:
    """The configuration that `to_dict` wrote (into a checkpoint, say). `origin` names the place in errors."""
    config = _apply(RunConfig(), values, origin, "")
    config.validate()
    return config


def _read(path: Path) -> dict:
    if path.suffix == ".json":
        return read_json(path, "--config")
    if path.suffix != ".toml":
        raise ConfigError("--config", f"{path} must end in .toml or .json")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("--config", f"{path} is not TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--config", f"cannot read {path} ({error})") from error


def _choice(key: str, known: dict, from_command: str, from_file: object, file: object) -> str:
    if from_command and from_file and from_command != from_file:
        raise ConfigError(f"--{key}", f"is {from_command}, but {file} is written for {key} = {from_file!r}: "
                          "leave out one of the two")
    name = from_command or from_file
    if name and not (isinstance(name, str) and name in known):
        raise ConfigError(key, f"{name!r} is not known; there is {', '.join(known)}")
    return name


def _parse_override(text: str) -> dict:
    key, separator, value = text.partition("=")
    path = key.strip().split(".")
    if not separator or not all(path):
        raise ConfigError("--set", f"must look like train.steps=100, not {text!r}")
    if path in (["preset"], ["recipe"]):
        raise ConfigError("--set", f"cannot choose the {path[0]}: use --{path[0]}")
    hint = RunConfig
    for name in path:
        hint = get_type_hints(hint).get(name) if is_dataclass(hint) else _item_of_table(hint)
    value = value.strip()
    if hint is not None and not is_dataclass(hint):  # anything else is refused when it is applied
        value = _from_text(value, hint)
    return reduce(lambda inner, name: {name: inner}, reversed(path), value)


def _from_text(text: str, hint: object) -> object:
    """The value that `text` stands for in TOML; the text itself where only that is what the key takes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    only_text_fits = _converted(parsed["value"], hint) is None and _converted(text, hint) is not None
    return text if only_text_fits or len(parsed) > 1 else parsed["value"]


def _apply_layer(config: RunConfig, layer: _Layer) -> RunConfig:
    return _apply(config, layer.values, layer.origin, "")


def _apply(config: object, values: dict, origin: str, prefix: str) -> object:
    """`config` with the given values in place of its own."""
    hints, changes = get_type_hints(type(config)), {}
    for name, value in values.items():
        key = prefix + name
        if name not in hints:
            raise ConfigError(key, f"is not a key of the run configuration ({origin}); "
                              f"{_hint(key, [prefix + known for known in hints])}")
        if is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise ConfigError(key, f"is a section ({origin}): set one of its keys, such as "
                                  f"{next(describe(getattr(config, name), key + '.')).name}")
            changes[name] = _apply(getattr(config, name), value, origin, key + ".")
        elif isinstance(value, dict) and (item := _item_of_table(hints[name])):
            for inner, part in value.items():
                if not isinstance(part, dict):
                    raise ConfigError(f"{key}.{inner}", f"must be a table with {', '.join(get_type_hints(item))}, not "
                                      f"{part!r} ({origin})")
            tables = getattr(config, name) if isinstance(getattr(config, name), dict) else {}
            changes[name] = tables | {inner: _apply(tables.get(inner, item()), part, origin, f"{key}.{inner}.")
                                      for inner, part in value.items()}
        else:
            changes[name] = _converted(value, hints[name])
            if changes[name] is None:
                raise ConfigError(key, f"must be {_name(hints[name])}, not {value!r} ({origin})")
    return replace(config, **changes)


def _item_of_table(hint: object) -> type | None:
    """The dataclass of the named tables that `hint` allows."""
    for option in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if get_origin(option) is dict:
            return get_args(option)[1]
    return None


def _hint(key: str, siblings: Sequence[str]) -> str:
    """What to do about an unknown key that was given in the place of `siblings`."""
    section, _, leaf = key.rpartition(".")
    if leaf in DEEPSPEED_KEYS:
        return "it belongs to the DeepSpeed JSON (--ds_config)"
    known = list(dict.fromkeys([*(item.name for item in describe()), *siblings]))
    moved = [name for name in known if name.rpartition(".")[2] == leaf]
    sections = {name.rpartition(".")[0] for name in known} - {""}
    near = moved or difflib.get_close_matches(key, [*known, *sections], n=1, cutoff=0.8)
    if near:
        return f"did you mean {near[0]}?"
    beside = dict.fromkeys(name[len(section) + 1:].partition(".")[0] for name in known
                           if section and name.startswith(f"{section}."))
    return f"known there: {', '.join(beside)}" if beside else "--help_config lists all keys"


def _converted(value: object, hint: object) -> object | None:
    """`value` as the type that `hint` asks for, an integer serving as a number; None if of another type."""
    if get_origin(hint) in (Union, types.UnionType):
        found = (_converted(value, option) for option in get_args(hint))
        return next((option for option in found if option is not None), None)
    if get_origin(hint) is dict:
        return value if isinstance(value, dict) else None
    if hint is list or get_origin(hint) is list:
        if not isinstance(value, list):
            return None
        items = [_converted(item, *get_args(hint)) for item in value] if get_args(hint) else value
        return None if None in items else items
    if hint is float:
        try:
            number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        except OverflowError:  # an integer beyond all floats
            return None
        return number if math.isfinite(number) else None
    if isinstance(value, bool) and hint is not bool:
        return None
    return value if isinstance(value, hint) else None


def _name(hint: object) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_name(option) for option in get_args(hint))
    if get_origin(hint) is list:
        return f"a list ({_name(get_args(hint)[0])} each)"
    if get_origin(hint) is dict:
        return "named tables"
    return {bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list"}[hint]
