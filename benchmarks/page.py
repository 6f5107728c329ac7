"""docs/benchmarks.md and its plots, made from what the benchmarks wrote (`benchmarks/results/*.json`)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.goals import GOALS, Goal
from benchmarks.plot import drawing
from benchmarks.report import ROOT, figure, goal_text

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
TITLES = {"attention": "Attention", "moe": "Experts", "step": "Training step", "sampling": "Cached conditioning",
          "data": "Data", "checkpoint": "Checkpoints", "resume": "Resuming", "balance": "Balance of the experts",
          "scaling": "Ranks", "gpu": "GPU"}
"""Part -> its heading, in the order of the page. All but `gpu` need no GPU."""

_HEAD = """# Benchmarks

Made by `make bench` from what `benchmarks/results/` holds; no figure is written by hand. All parts take 75
minutes on two quiet cores. A part that was measured on this machine with the same code is not measured again;
`make bench PART=step` asks for one part, `make bench AGAIN=1` for all anew. On a GPU machine `bash benchmarks/gpu.sh`
checks the kernels and measures them in one call, without a network.

Contenders are measured in turns within one run. A figure is a median, with the least and greatest of its repeats behind
it; `x` is how many times as fast. How well the models write is measured elsewhere: [results](results/README.md).
"""


def write_page(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Writes the page, and its plots into a folder beside it."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    plots = page.with_name(f"{page.stem}-plots")
    plots.mkdir(parents=True, exist_ok=True)
    for old in plots.glob("*.svg"):
        old.unlink()
    for each in found.values():
        for plot in each["plots"]:
            text = drawing(plot["title"], plot["x"], plot["y"], plot["curves"])
            (plots / f"{plot['name']}.svg").write_text(text)
    page.write_text(page_text(found, plots.name))


def page_text(found: dict[str, dict], plots: str) -> str:
    """found: part -> what its benchmark wrote. plots: folder of the pictures, seen from the page."""
    order = [*(part for part in TITLES if part in found), *(part for part in found if part not in TITLES)]
    sections = [_section(found[part], plots) for part in order]
    return "\n".join([_HEAD, "## Goals\n", _goals(found), "", *sections])


def _goals(found: dict[str, dict]) -> str:
    rows = {row["key"]: row for each in found.values() for row in each["rows"]}
    lines = []
    for goal in GOALS:
        row = rows.get(goal.key)
        command = f"`{found[goal.part]['command']}`" if row else ""
        lines.append([goal.what, goal_text(goal), _verdict(goal, row, goal.part in found), command])
    return _table(["what", "goal", "measured", "by"], lines)


def _verdict(goal: Goal, row: dict | None, ran: bool) -> str:
    """ran: whether the part that has the row was measured."""
    if row is None:
        why = (": it failed" if ran else ": needs a GPU") if goal.part == "gpu" else ""
        return f"not measured{why}"
    text = figure(row["value"], row["low"], row["high"], row["unit"])
    return text if goal.reached(row["value"]) else f"{text}, **missed**"


def _section(found: dict, plots: str) -> str:
    part = found["part"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [f"## {TITLES.get(part, part.capitalize())}", _prose(found["about"]), f"```\n{found['command']}\n```",
             f"{found['measured']}, commit {found['commit']}; {found['machine']}; {versions}."]
    if found["rows"]:
        parts.append(_table(["what", "measured", "goal"], [
            [row["what"], figure(row["value"], row["low"], row["high"], row["unit"]), row["goal"] or ""]
            for row in found["rows"]]))
    parts += [f"{table['title']}:\n\n{_table(table['columns'], table['rows'])}" for table in found["tables"]]
    parts += [f"![{plot['title']}]({plots}/{plot['name']}.svg)" for plot in found["plots"]]
    return "\n\n".join(parts) + "\n"


def _prose(about: str) -> str:
    """A module's docstring without its command, which is indented."""
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"^    .*$", "", about, flags=re.MULTILINE)).strip()


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
