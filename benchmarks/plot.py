"""Curves as an SVG file of its own, on logarithmic axes: lengths double, and what is linear is a straight line of
slope one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from tools.reporting.charts import number

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 320, 70, 26, 34, 44
_COLOURS = ("#1f6fd0", "#c4501a", "#14866d", "#9b3fb5", "#9a7400", "#c22f5d")
_STYLE = """text { font: 12px system-ui, sans-serif; fill: #5b6474 } .title { font-weight: 600; fill: #1d2330 }
.paper { fill: #fff } .grid { stroke: #dfe3ea } .line { fill: none; stroke-width: 2 }"""


def drawing(title: str, x: str, y: str, curves: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """The file's text. curves: name -> points of positive numbers."""
    points = [point for curve in curves.values() for point in curve]
    across, up = (_LogAxis([point[index] for point in points]) for index in (0, 1))
    legend_rows = -(-len(curves) // 3)
    top, bottom = _TOP + 18 * legend_rows, _HEIGHT + 18 * legend_rows - _BOTTOM
    svg = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg", role="img",
                              viewBox=f"0 0 {_WIDTH} {bottom + _BOTTOM}")

    def add(tag: str, text: str = "", **attributes: object) -> None:
        names = {name.rstrip("_").replace("_", "-"): f"{value:.1f}" if isinstance(value, float) else str(value)
                 for name, value in attributes.items()}
        ElementTree.SubElement(svg, tag, names).text = text or None

    def place(point: Sequence[float]) -> tuple[float, float]:
        return (_LEFT + across(point[0]) * (_WIDTH - _LEFT - _RIGHT), bottom - up(point[1]) * (bottom - top))

    add("title", title)
    add("style", _STYLE)
    add("rect", class_="paper", width=_WIDTH, height=bottom + _BOTTOM)
    add("text", title, class_="title", x=_LEFT, y=18)
    for value in up.ticks:
        _, at = place((points[0][0], value))
        add("path", class_="grid", d=f"M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}")
        add("text", number(value), x=_LEFT - 8, y=at + 4, text_anchor="end")
    for value in across.ticks:
        at, _ = place((value, points[0][1]))
        add("path", class_="grid", d=f"M{at:.1f} {top}V{bottom}")
        add("text", f"{value:,.0f}", x=at, y=bottom + 18, text_anchor="middle")
    add("text", x, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=bottom + 36, text_anchor="middle")
    add("text", y, transform=f"translate(14 {(top + bottom) / 2}) rotate(-90)", text_anchor="middle")
    for index, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        add("path", class_="line", stroke=colour, d="M" + "L".join("{:.1f} {:.1f}".format(*place(p)) for p in curve))
        for point in curve:
            at_x, at_y = place(point)
            add("circle", cx=at_x, cy=at_y, r=3, fill=colour)
        left, line = _LEFT + 160 * (index % 3), 36 + 18 * (index // 3)
        add("path", class_="line", stroke=colour, d=f"M{left} {line - 4}h18")
        add("text", name, x=left + 24, y=line)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


class _LogAxis:
    """Maps values to [0, 1] by their logarithms. ticks: powers of two over the values."""

    def __init__(self, values: Sequence[float]):
        self._low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
        self._range = max(high - self._low, 1)
        step = -(-self._range // 8)
        self.ticks = [2.0**power for power in range(self._low, self._low + self._range + 1, step)]

    def __call__(self, value: float) -> float:
        return (math.log2(value) - self._low) / self._range
