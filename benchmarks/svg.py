"""Line charts as plain SVG, so that a plot in docs/ needs no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 330, 56, 14, 40, 84
_COLOURS = ("#c0504d", "#7f7f7f", "#4f81bd", "#2e7d32")
_DASHES = ("6 3", "2 3", "", "8 2 2 2")  # told apart without colours too


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Lines over shared x values, which are spaced by their logarithms; y starts at `bottom`."""

    title: str
    x_label: str
    xs: Sequence[float]
    lines: Mapping[str, Sequence[float]]
    bottom: float = 0.0


def draw(charts: Sequence[Chart]) -> str:
    """The charts side by side, as one SVG document."""
    width = _WIDTH * len(charts)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" width="{width}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, chart in enumerate(charts):
        parts += [f'<g transform="translate({i * _WIDTH} 0)">', *_chart(chart), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _chart(chart: Chart) -> list[str]:
    top = max(max(line) for line in chart.lines.values())
    step = _step((top - chart.bottom) / 5)
    top = chart.bottom + step * math.ceil((top - chart.bottom) / step - 1e-9)
    low, high = math.log(chart.xs[0]), math.log(chart.xs[-1])

    def x(value: float) -> float:
        return round(_LEFT + (math.log(value) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - (value - chart.bottom) / (top - chart.bottom) * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = [f'<text x="{_LEFT}" y="22" font-size="13" font-weight="bold">{escape(chart.title)}</text>']
    for i in range(round((top - chart.bottom) / step) + 1):
        value = chart.bottom + i * step
        parts.append(f'<path d="M{_LEFT} {y(value)}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>')
    for value in chart.xs:
        parts.append(f'<text x="{x(value)}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{value:,}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - _BOTTOM + 31}" text-anchor="middle">{escape(chart.x_label)}</text>')
    for i, (name, line) in enumerate(chart.lines.items()):
        style = f'fill="none" stroke="{_COLOURS[i]}" stroke-width="2" stroke-dasharray="{_DASHES[i]}"'
        points = " ".join(f"{x(a)},{y(b)}" for a, b in zip(chart.xs, line, strict=True))
        parts.append(f'<polyline points="{points}" {style}/>')
        at_x, at_y = _LEFT + i % 2 * 200, _HEIGHT - 36 + i // 2 * 18
        parts.append(f'<path d="M{at_x} {at_y}h28" {style}/><text x="{at_x + 34}" y="{at_y + 4}">{escape(name)}</text>')
    return parts


def _step(least: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is no less."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
