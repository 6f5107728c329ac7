"""Plots as SVG files that stand alone: the report's charts with their style sheet inside."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tools.reporting import charts
from tools.reporting.charts import Series

_STYLE = Path(charts.__file__).with_name("page.css")
_ATTRIBUTE = re.compile(r"([\w-]+)=(\"[^\"]*\"|[^\s\">]+?)(?=\s|/?>)")
_LINE = 18


class Drawing(NamedTuple):
    title: str
    svg: str


def curves(plot: dict, rows: Sequence[dict], heads: dict[str, str]) -> Drawing | None:
    """A measure of all rows over a key of their configuration or another measure; None if no row has both. Over the
    logarithm, rows at 0 or less are left out, and the axis says so."""
    points: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    left_out = False
    for row in rows:
        x, y = _value(row, plot["x"]), _value(row, plot["y"])
        if plot["logarithmic"] and x is not None and x <= 0:
            left_out = True
        elif x is not None and y is not None:
            points[row["curve"]][math.log10(x) if plot["logarithmic"] else x].append(y)
    if not points:
        return None
    series = [Series(name, [(x, fmean(ys)) for x, ys in sorted(found.items())], place, place // charts.COLOURS)
              for place, (name, found) in enumerate(points.items())]
    x = heads.get(plot["x"], plot["x"])
    if plot["logarithmic"]:
        x = f"log10 of {x}{', without 0' if left_out else ''}"
    title = plot["title"] or f"{heads[plot['y']]} over {x}"
    return Drawing(title, _alone(title, charts.lines(title, series, x=x, y=heads[plot["y"]], marks=True), series))


def ranking(measure: str, values: Sequence[tuple[str, float]], decimals: int) -> Drawing:
    """One measure of all rows as bars."""
    letters = max(len(name) for name, _ in values)
    group = "", [(name, value, 0) for name, value in values]
    figure = charts.bars(measure, [group], letters=letters, decimals=decimals)
    return Drawing(measure, _alone(measure, figure, []))


def _value(row: dict, name: str) -> float | None:
    values = [value for value in row["values"].get(name, []) if value is not None]
    if values:
        return fmean(values)
    found = row["settings"].get(name)
    return found if isinstance(found, int | float) else None


def _alone(title: str, figure: str, series: Sequence[Series]) -> str:
    """The drawing of a figure of the report as a file: well-formed, with colours, and with the key that the page has
    beside it."""
    drawing = figure[figure.index("<svg class=plot"):figure.rindex("</svg>") + len("</svg>")]
    drawing = re.sub(r"<[a-z][^<>]*>", lambda tag: _ATTRIBUTE.sub(_quoted, tag[0]), drawing)
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', drawing).groups())
    top = 22 + _LINE * len(series) * (len(series) > 1)
    key = "".join(f'<path class="line {each.style}" d="M12 {22 + _LINE * place + 8}h24"/>'
                  f'<text x="42" y="{22 + _LINE * place + 12}">{escape(each.name)}</text>'
                  for place, each in enumerate(series)) if len(series) > 1 else ""
    drawing = drawing.replace("<svg ", f'<svg y="{top}" width="{width:g}" height="{height:g}" ', 1)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height + top:g}" width="{width:g}" '
            f'height="{height + top:g}"><style>{_STYLE.read_text()}\nsvg text {{ font-family: sans-serif; }}</style>'
            f'<rect width="100%" height="100%" style="fill: var(--paper)"/>'
            f'<text class="strong" x="12" y="16">{escape(title)}</text>{key}{drawing}</svg>\n')


def _quoted(match: re.Match) -> str:
    name, value = match.groups()
    return f"{name}={value}" if value.startswith('"') else f'{name}="{value}"'
