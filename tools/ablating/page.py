"""A grid's results as a Markdown page with its plots beside it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from tools.ablating.grid import MEASURED
from tools.ablating.levels import MATCHED
from tools.ablating.plots import curves, ranking
from tools.reporting.charts import number
from tools.scoring.columns import COLUMNS

HEADS = {**COLUMNS, **MEASURED}
_SIGHTED = "greedy extractive oracle"
"""A trivial system that sees the reference, and so only bounds others."""
_USUAL = {"text": ("bleu", "rougeL"), "answers": ("f1", "exact_match"), "labels": ("accuracy",)}
_DEFAULT = ("slots", "supported", "cross_entropy", "distinct2", "self_bleu", "length_ratio", "empty", "steps",
            "minutes", "seconds_per_text")
_DECIMALS = {**dict.fromkeys(MATCHED, 3), "expert_variation": 2, "position_routing": 3, "length_ratio": 2, "minutes": 1,
             "memory_gb": 2}


def write(results: dict, folder: Path, name: str) -> Path:
    """Writes NAME.md and NAME-*.svg to the folder; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# {results['title']}\n\n{results['question']}\n\n{_how(results)}"]
    if len(results["sets"]) > 1:
        parts.append(overview(results))
    for data in results["sets"]:
        parts.append(f"## {data['name']}\n\n{data['documents']} test documents." if len(results["sets"]) > 1
                     else f"{data['name']}: {data['documents']} test documents.")
        parts += [table(results, data), _levels(data), differences(data)]
        for place, drawing in enumerate(_drawings(results, data)):
            file = folder / f"{name}-{data['name']}-{place}.svg"
            file.write_text(drawing.svg)
            parts.append(f"![{drawing.title}]({file.name})")
    page = folder / f"{name}.md"
    page.write_text("\n\n".join(filter(None, parts)) + "\n")
    return page


def _how(results: dict) -> str:
    (unit, budget), = results["budget"].items()
    clock = "of its one thread's time" if results["clock"] == "cpu_seconds" else "of the clock"
    spent = f"{budget:g} minutes {clock} to train each model" if unit == "minutes" else f"{number(budget)} tokens each"
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (f"Equal budget: {spent}. {machine['processor'] or machine['platform']}, {machine['device']}, {versions}, "
            f"commit {machine['commit'][:12]}. Made by:\n\n```\n{results['command']}\n```\n\n"
            "Means over seeds ± their standard deviation where there are several. Minutes, steps: of training; s a "
            "text: to generate one.")


def _levels(data: dict) -> str:
    """What the cross-entropies are of."""
    if not data["levels"]:
        return ("No cross-entropies: there is no noise level at which all models can tell equally many tokens from "
                "their own noisy embeddings.")
    shares = ", ".join(f"{100 * each:g} %" for each in data["levels"])
    return ("Cross-entropy, token accuracy and embedding error are means over the noise levels at which, by Bayes' "
            f"rule, {shares} of the tokens can be told from their own noisy embedding.")


def overview(results: dict) -> str:
    """The usual score of every set's task, side by side, and the best of the trivial systems there."""
    sets = [data for data in results["sets"] if data["rows"]]
    heads = [_USUAL[data["task"]][0] for data in sets]
    lines = [["", *(f"{data['name']}: {HEADS[head]}" for data, head in zip(sets, heads, strict=True))],
             ["---", *["---:"] * len(sets)]]
    for name in dict.fromkeys(_name(row) for data in sets for row in data["rows"]):
        found = [next((row for row in data["rows"] if _name(row) == name), None) for data in sets]
        lines.append([name or "model", *(_spread(head, row["values"].get(head, [])) if row else ""
                                         for row, head in zip(found, heads, strict=True))])
    best = [max(((values[head], system) for system, values in data["trivial"].items() if system != _SIGHTED))
            for data, head in zip(sets, heads, strict=True)]
    lines.append(["*best trivial system*", *(f"{_number(head, value)} ({system})"
                                             for (value, system), head in zip(best, heads, strict=True))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def columns(results: dict, data: dict) -> list[str]:
    """Names of the table's columns: those that the grid names, or the usual ones that were measured."""
    if results["columns"]:
        return results["columns"]
    measured = {name for row in data["rows"] for name in row["values"]}
    return [name for name in (*_USUAL[data["task"]], *_DEFAULT) if name in measured]


def table(results: dict, data: dict) -> str:
    """Every row, then the trivial systems."""
    names = columns(results, data)
    lines = [["", *(HEADS[name] for name in names)], ["---", *["---:"] * len(names)]]
    lines += [[_name(row), *(_spread(name, row["values"].get(name, [])) for name in names)] for row in data["rows"]]
    lines += [[f"*{system}*", *(_number(name, values[name]) if name in values else "" for name in names)]
              for system, values in data["trivial"].items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def differences(data: dict) -> str:
    """How far each row is ahead of the first one, with 95 % intervals."""
    first, *others = data["rows"]
    names = [name for name in ("bleu", "rouge1", "rougeL", "f1", "accuracy")
             if any(name in row.get("difference", {}) for row in others)]
    if not names:
        return ""
    by_seed = any(len(row["seeds"]) > 1 for row in others)
    heads = [HEADS[name] for name in names] + [f"{HEADS[names[0]]}, seed by seed"] * by_seed
    lines = [[f"lead over {_name(first)}", *heads], ["---", *["---:"] * len(heads)]]
    for row in others:
        cells = [_lead(row.get("difference", {}), name) for name in names]
        seeds = [_lead(each, names[0]) for each in row.get("difference_by_seed", {}).values()]
        lines.append([_name(row), *cells, *["; ".join(filter(None, seeds))] * by_seed])
    return ("\n".join(f"| {' | '.join(line)} |" for line in lines)
            + "\n\nIn brackets: 95 % of 1,000 resamplings of the documents, in pairs.")


def _lead(found: dict, name: str) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*found[name]) if name in found else ""


def _drawings(results: dict, data: dict) -> list:
    if results["plots"]:
        drawn = [curves(plot, data["rows"], HEADS) for plot in results["plots"]]
        return [each for each in drawn if each is not None]
    name = columns(results, data)[0]
    values = [(_name(row), statistics.fmean(row["values"][name])) for row in data["rows"] if name in row["values"]]
    return [ranking(HEADS[name], values, _DECIMALS.get(name, 1))] if values else []


def _name(row: dict) -> str:
    return ", ".join(filter(None, (row["cell"], row["sampler"])))


def _spread(name: str, values: Sequence[float | None]) -> str:
    values = [value for value in values if value is not None]
    if not values:
        return ""
    if len(values) == 1:
        return _number(name, values[0])
    return f"{_number(name, statistics.fmean(values))} ± {_number(name, statistics.stdev(values))}"


def _number(name: str, value: float) -> str:
    if name in ("steps", "tokens", "parameters"):
        return number(value)
    if name == "seconds_per_text":
        return f"{value:.2g}"
    if name in ("documents", "empty", "short"):
        return f"{round(value, 1):g}"
    return f"{value:.{_DECIMALS.get(name, 1)}f}"
