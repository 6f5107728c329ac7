"""How long the documents are: figures, a table, and a plot as SVG that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from trainer.data.config import DataConfig
from trainer.data.packing import Samples
from trainer.data.token_cache import TokenCache

_QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_COLOURS = {"train": "#1f6fd0", "valid": "#c4501a", "test": "#14866d"}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 220, 48, 24, 34, 40


def statistics(cache: TokenCache, config: DataConfig) -> dict:
    """Figures of one split in tokens, and what the limits of `config` would cut from it."""
    samples = Samples(cache, max_source_tokens=config.max_source_tokens, max_target_tokens=config.max_target_tokens,
                      row_tokens=int(cache.source_lengths_N.max()) + 2 + config.max_target_tokens)
    facts = {"documents": len(cache), "samples": len(samples)}
    for side, lengths_N in _sides(cache).items():
        values = np.quantile(lengths_N, list(_QUANTILES.values()), method="lower")
        facts[side] = {"tokens": int(lengths_N.sum()), "mean": float(lengths_N.mean()),
                       **dict(zip(_QUANTILES, map(int, values), strict=True)),
                       "empty": int((lengths_N == 0).sum()), "cut": getattr(samples, f"{side}s_cut")}
    return facts


def _sides(cache: TokenCache) -> dict[str, np.ndarray]:
    sides = {"source": cache.source_lengths_N, "target": cache.target_lengths_N}
    return sides if cache.paired_N.any() else {"target": sides["target"]}


def table(splits: Mapping[str, dict], config: DataConfig) -> str:
    """The figures of all splits, aligned; `cut` counts documents."""
    counted = (*_QUANTILES, "empty", "cut")
    head = ("split", "documents", "side", "tokens", "mean", *counted)
    rows = [head]
    for name, facts in splits.items():
        for side in ("source", "target"):
            if side in facts:
                figures = facts[side]
                rows.append((name, f"{facts['documents']:,}", side, f"{figures['tokens']:,}", f"{figures['mean']:,.1f}",
                             *(f"{figures[key]:,}" for key in counted)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) if place in (0, 2) else cell.rjust(width)
                       for place, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows]
    return "\n".join([*lines, f"cut: with at most {config.max_source_tokens or 'all'} tokens of a source "
                      f"(data.max_source_tokens) and {config.max_target_tokens} of a target (data.max_target_tokens)"])


def plot(caches: Mapping[str, TokenCache], config: DataConfig) -> str:
    """Share of documents by length, source above target, over a logarithmic axis, with the limits as dashed lines."""
    limits = {"source": config.max_source_tokens, "target": config.max_target_tokens}
    sides = [side for side in limits if any(side in _sides(cache) for cache in caches.values())]
    panels = ""
    for index, side in enumerate(sides):
        lengths = {name: _sides(cache)[side] for name, cache in caches.items() if side in _sides(cache)}
        panels += _panel(side, lengths, limits[side], index * _HEIGHT)
    height = _HEIGHT * len(sides)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH * 2}" '
            f'height="{height * 2}" font-family="sans-serif" font-size="11" fill="#333">'
            f'<title>Lengths of documents</title><rect width="100%" height="100%" fill="#fff"/>{panels}</svg>\n')


def _panel(side: str, lengths: Mapping[str, np.ndarray], limit: int, top: int) -> str:
    octaves = int(np.ceil(np.log2(max(int(lengths_N.max()) for lengths_N in lengths.values()) + 1))) + 1
    edges = 2.0 ** np.arange(0, octaves + 0.25, 0.5)  # half octaves; what is shorter than 1 counts to the first
    shares = {name: np.histogram(np.maximum(lengths_N, 1), edges)[0] / len(lengths_N)
              for name, lengths_N in lengths.items()}
    highest = max(share.max() for share in shares.values())
    right, bottom = _WIDTH - _RIGHT, top + _HEIGHT - _BOTTOM

    def across(tokens: float) -> float:
        return _LEFT + (right - _LEFT) * np.log2(tokens) / octaves

    def up(share: float) -> float:
        return bottom - (bottom - top - _TOP) * share / highest

    def text(x: float, y: float, content: str, more: str) -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(content)}</text>'

    middle, end = 'text-anchor="middle"', 'text-anchor="end"'
    parts = [text(_LEFT, top + 16, f"{side.capitalize()}: share of documents by length", 'font-weight="bold"'),
             f'<path d="M{_LEFT} {bottom}H{right}" stroke="#888" fill="none"/>',
             text((_LEFT + right) / 2, bottom + 30, "tokens", middle)]
    for octave in range(0, octaves + 1, 2 if octaves > 7 else 1):
        parts.append(text(across(2.0 ** octave), bottom + 15, f"{2 ** octave:,}", middle))
    for share in np.linspace(0, highest, 4):
        parts.append(f'<path d="M{_LEFT} {up(share):.1f}H{right}" stroke="#ddd" fill="none"/>'
                     + text(_LEFT - 5, up(share) + 4, f"{share:.0%}", end))
    if 1 <= limit <= edges[-1]:
        parts.append(f'<path d="M{across(limit):.1f} {top + _TOP}V{bottom}" stroke="#333" stroke-dasharray="4 3" '
                     f'fill="none"><title>data.max_{side}_tokens = {limit}</title></path>')
    for number, (name, share) in enumerate(shares.items()):
        parts.append(_steps([across(edge) for edge in edges], [up(value) for value in share], _COLOURS[name], name))
        parts.append(text(right - 44 * (len(shares) - 1 - number), top + 16, name, f'{end} fill="{_COLOURS[name]}"'))
    return "".join(parts)


def _steps(edges: Sequence[float], heights: Sequence[float], colour: str, name: str) -> str:
    path = f"M{edges[0]:.1f} {heights[0]:.1f}" + "".join(
        f"V{height:.1f}H{edge:.1f}" for height, edge in zip(heights, edges[1:], strict=True))
    return f'<path d="{path}" stroke="{colour}" stroke-width="2" fill="none"><title>{escape(name)}</title></path>'
