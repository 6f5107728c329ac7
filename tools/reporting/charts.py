"""Figures as inline SVG: lines, bars and heat maps, coloured by the page's style sheet.

A figure is drawn at its natural size and only ever shrinks or grows with its column, so that its text stays readable.
Colours are classes: c0 to c5 for series, q0 to q8 for the steps of a heat map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

COLOURS, DASHES, SHADES = 6, 4, 9
_MOST_POINTS = 200
_WIDTH, _HEIGHT = 400, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 12, 10, 36

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A named curve; colour and dash are numbers, taken modulo COLOURS and DASHES."""

    name: str
    points: Points
    colour: int = 0
    dash: int = 0

    @property
    def style(self) -> str:
        return f"c{self.colour % COLOURS} d{self.dash % DASHES}"


@dataclass(frozen=True)
class _Axis:
    """Maps values of [low, high] to pixels of [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high], 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Four significant digits, from ten thousand on with k, M or G."""
    for unit, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if sign == 'k' else unit):.4g}{sign}"
    return f"{value:.4g}"


def thinned(points: Points) -> Points:
    """At most _MOST_POINTS: means over neighbours."""
    group = math.ceil(len(points) / _MOST_POINTS)
    if group <= 1:
        return points
    parts = [points[start:start + group] for start in range(0, len(points), group)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _drawable(series: Sequence[Series]) -> list[Series]:
    """The curves that have a finite point, with only these, thinned."""
    kept = [(each, [(x, y) for x, y in each.points if math.isfinite(y)]) for each in series]
    return [replace(each, points=thinned(points)) for each, points in kept if points]


def figure(title: str, drawing: str, note: str = "", legend: str = "") -> str:
    """A drawing with its title above and a note below."""
    note = f"<p class=note>{escape(note)}</p>" if note else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{legend}{drawing}{note}</figure>"


def legend(series: Sequence[Series]) -> str:
    """Swatches and names, as text that wraps."""
    items = "".join(f'<li><svg class=swatch viewBox="0 0 24 8" aria-hidden=true><path class="line {each.style}" '
                    f'd="M0 4H24"/></svg>{escape(each.name)}</li>' for each in series)
    return f"<ul class=legend>{items}</ul>"


def lines(title: str, series: Sequence[Series], *, x: str = "step", y: str, note: str = "", from_zero: bool = False,
          marks: bool = False, flip: bool = False, key: bool | None = None) -> str:
    """Curves over a common axis. from_zero: the y axis holds 0; marks: a dot at every point; flip: x grows to the
    left; key: whether there is a legend (default: where there are several curves). Empty without a finite point."""
    series = _drawable(series)
    if not series:
        return ""
    across = _span([px for each in series for px, _ in each.points])
    up = _span([py for each in series for _, py in each.points] + ([0.0] if from_zero else []), room=0.06)
    ends = (_WIDTH - _RIGHT, _LEFT) if flip else (_LEFT, _WIDTH - _RIGHT)
    x_axis, y_axis = _Axis(*across, *ends), _Axis(*up, _HEIGHT - _BOTTOM, _TOP)
    drawing = _grid(x_axis, y_axis, x, y) + "".join(_curve(each, x_axis, y_axis, marks) for each in series)
    key = len(series) > 1 if key is None else key
    return figure(title, svg(f"{title}: {y} over {x}", drawing), note, legend(series) if key else "")


def panels(title: str, cells: Sequence[tuple[str, Sequence[Series]]], *, y: str, note: str = "") -> str:
    """A small chart for every cell that has a finite point; empty without any. All span the same difference in y, so
    that slopes compare."""
    width, height, left = 200, 116, 34
    cells = [(name, curves) for name, series in cells if (curves := _drawable(series))]
    if not cells:
        return ""
    across = _span([px for _, series in cells for each in series for px, _ in each.points])
    ranges = [_span([py for each in series for _, py in each.points]) for _, series in cells]
    tallest = 1.1 * max(high - low for low, high in ranges)
    drawn = []
    for (name, series), (low, high) in zip(cells, ranges, strict=True):
        middle = (low + high) / 2
        x_axis = _Axis(*across, left, width - 4)
        y_axis = _Axis(middle - tallest / 2, middle + tallest / 2, height - 4, 6)
        marks = "".join(f'<path class=grid d="M{left} {y_axis(at):.1f}H{width - 4}"/><text x={left - 4} '
                        f'y={y_axis(at) + 4:.1f} text-anchor=end>{number(at)}</text>'
                        for at in ticks(y_axis.low, y_axis.high, 3))
        curves = "".join(_curve(each, x_axis, y_axis, False) for each in series)
        drawing = svg(f"{title}, {name}: {y} over step", marks + curves, width, height)
        drawn.append(f"<div><h4>{escape(name)}</h4>{drawing}</div>")
    named = list({each.name: each for _, series in cells for each in series}.values())
    note = f"{note} Steps {number(across[0])} to {number(across[1])}."
    return figure(title, f"<div class=panels>{''.join(drawn)}</div>", note, legend(named) if len(named) > 1 else "")


def bars(title: str, groups: Sequence[tuple[str, Sequence[tuple[str, float, int]]]], *, note: str = "",
         letters: int = 24, decimals: int = 1) -> str:
    """Horizontal bars from 0 in named groups of (name, value, colour). letters: of a name, before it is cut.
    decimals: of the values beside the bars."""
    room = round(6.6 * letters)
    longest = max(value for _, group in groups for _, value, _ in group) or 1.0
    drawing, top = [], 0
    for name, group in groups:
        drawing.append(f"<text x=0 y={top + 13} class=strong>{escape(name)}</text>")
        top += 20
        for label, value, colour in group:
            length = 190 * value / longest
            drawing.append(f"<text x={room} y={top + 11} text-anchor=end>{escape(_short(label, letters))}</text>"
                           f'<rect class="bar c{colour % COLOURS}" x={room + 6} y={top + 1} width={length:.1f} '
                           f"height=12 rx=2><title>{escape(label)}: {value:.{decimals}f}</title></rect>"
                           f"<text x={room + 10 + length:.1f} y={top + 11}>{value:.{decimals}f}</text>")
            top += 17
        top += 8
    return figure(title, svg(title, "".join(drawing), room + 242, top), note)


def heat_map(title: str, columns: Sequence[float], rows: Sequence[tuple[str, Sequence[float]]],
             shade: Callable[[float], float], *, y: str, x: str = "step", note: str = "") -> str:
    """Cells of rows by columns, blank where not finite. shade: value -> [0, 1], from light to dark."""
    tall = max(6, min(16, 160 // len(rows)))
    bottom = _TOP + tall * len(rows)
    wide = (_WIDTH - _LEFT - _RIGHT) / len(columns)
    paths: dict[int, list[str]] = {}
    labels, label_every = [], math.ceil(11 / tall)
    for index, (name, values) in enumerate(rows):
        top = _TOP + tall * index
        if index % label_every == 0:
            labels.append(f"<text x={_LEFT - 6} y={top + tall / 2 + 4:.1f} text-anchor=end>{escape(name)}</text>")
        for column, value in enumerate(values):
            if not math.isfinite(value):
                continue
            level = min(SHADES - 1, max(0, int(SHADES * shade(value))))
            paths.setdefault(level, []).append(f"M{_LEFT + wide * column:.1f} {top}h{wide:.1f}v{tall}h-{wide:.1f}z")
    cells = "".join(f'<path class="cell q{level}" d="{"".join(parts)}"/>' for level, parts in sorted(paths.items()))
    last = len(columns) - 1
    for column in sorted({0, last // 2, last}):
        at = _LEFT + wide * (column + 0.5)
        anchor = "end" if column == last > 0 else "middle"
        labels.append(f"<text x={at:.1f} y={bottom + 15} text-anchor={anchor}>{number(columns[column])}</text>")
    labels.append(f"<text x={(_LEFT + _WIDTH - _RIGHT) / 2} y={bottom + 30} text-anchor=middle>{escape(x)}</text>")
    labels.append(_upright(y, (_TOP + bottom) / 2))
    return figure(title, svg(f"{title}: {y} by {x}", cells + "".join(labels), _WIDTH, bottom + 36), note)


def shade_key(lightest: str, middle: str, darkest: str) -> str:
    """The shades of a heat map from light to dark with what they stand for."""
    wide = (_WIDTH - 40) / SHADES
    cells = "".join(f'<path class="cell q{level}" d="M{20 + wide * level:.1f} 2h{wide:.1f}v12h-{wide:.1f}z"/>'
                    for level in range(SHADES))
    labels = ((20, "start", lightest), (_WIDTH / 2, "middle", middle), (_WIDTH - 20, "end", darkest))
    texts = "".join(f"<text x={x} y=30 text-anchor={anchor}>{escape(label)}</text>" for x, anchor, label in labels)
    return svg("Shades from few to many tokens", cells + texts, _WIDTH, 36, "key")


def svg(title: str, content: str, width: int = _WIDTH, height: float = _HEIGHT, kind: str = "plot") -> str:
    """The drawing with its name for screen readers."""
    return (f'<svg class={kind} viewBox="0 0 {width} {height}" role=img aria-label="{escape(title)}">'
            f"<title>{escape(title)}</title>{content}</svg>")


def _span(values: Sequence[float], room: float = 0.0) -> tuple[float, float]:
    """Least and greatest with `room` (a share of their difference) on both sides; never empty."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room_for_one = abs(high) * 0.05 or 1.0
        return low - room_for_one, high + room_for_one
    below = 0.0 if low == 0.0 else room * (high - low)
    return low - below, high + room * (high - low)


def _grid(x_axis: _Axis, y_axis: _Axis, x: str, y: str) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [f'<path class=grid d="M{_LEFT} {y_axis(at):.1f}H{right}"/><text x={_LEFT - 6} y={y_axis(at) + 4:.1f} '
             f"text-anchor=end>{number(at)}</text>" for at in ticks(y_axis.low, y_axis.high)]
    parts += [f"<text x={x_axis(at):.1f} y={bottom + 16} text-anchor={'end' if x_axis(at) > right - 12 else 'middle'}>"
              f"{number(at)}</text>" for at in ticks(x_axis.low, x_axis.high)]
    parts.append(f'<path class=axis d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(f"<text x={(_LEFT + right) / 2} y={_HEIGHT - 4} text-anchor=middle>{escape(x)}</text>")
    return "".join(parts) + _upright(y, (_TOP + bottom) / 2)


def _upright(text: str, y: float) -> str:
    return f'<text transform="translate(11 {y:.1f}) rotate(-90)" text-anchor=middle>{escape(text)}</text>'


def _curve(series: Series, x_axis: _Axis, y_axis: _Axis, marks: bool) -> str:
    """The line, with a spot at every point that says its values where the pointer rests on it."""
    places = [(x_axis(px), y_axis(py)) for px, py in series.points]
    path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
    radius, kind = (3, "dot") if marks or len(places) == 1 else (5, "spot")
    spots = "".join(f'<circle class="{kind} {series.style}" cx={px:.1f} cy={py:.1f} r={radius}>'
                    f"<title>{escape(series.name)}: {number(value)} at {number(at)}</title></circle>"
                    for (px, py), (at, value) in zip(places, series.points, strict=True))
    return f'<path class="line {series.style}" d="{path}"/>{spots}'


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most - 1] + "…"
