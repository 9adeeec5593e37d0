"""A figure as SVG elements: what stands in it is escaped and well formed by construction. page.css has the colours."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Final, Literal

from markupsafe import Markup

Anchor = Literal["start", "middle", "end"]
Point = tuple[float, float]

_NOT_TEXT: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
CHAR_WIDTH: Final = 6.2  # of the figures' letters, at most, in units of the drawing; they are 11 high


def printable(text: object) -> str:
    """Without what neither HTML nor XML can hold: control characters and lone surrogates become U+FFFD."""
    return _NOT_TEXT.sub("\ufffd", str(text))


class Canvas:
    """Draws into a field of `width` by `height` units, which a page scales as a whole.

    `style` names classes of page.css. A shape with a `label` says it when it is pointed at. Lengths are rounded to
    tenths of a unit.
    """

    def __init__(self, width: float, height: float, *, title: str, style: str = "") -> None:
        """`title` is what someone hears who doesn't see the figure."""
        self.width = width
        self.height = height
        self._root = ET.Element(
            "svg",
            {"class": f"figure {style}".strip(), "viewBox": f"0 0 {_number(width)} {_number(height)}", "role": "img"},
        )
        self._root.set("aria-label", printable(title))

    def rect(self, x: float, y: float, width: float, height: float, style: str, label: str | None = None) -> ET.Element:
        return self._add("rect", style, label, x=x, y=y, width=max(width, 0.0), height=max(height, 0.0))

    def dot(self, x: float, y: float, radius: float, style: str, label: str | None = None) -> ET.Element:
        return self._add("circle", style, label, cx=x, cy=y, r=radius)

    def line(self, start: Point, end: Point, style: str) -> ET.Element:
        return self._add("line", style, None, x1=start[0], y1=start[1], x2=end[0], y2=end[1])

    def path(self, points: Sequence[Point], style: str, *, closed: bool = False) -> ET.Element:
        shape = self._add("polygon" if closed else "polyline", style, None)
        shape.set("points", " ".join(f"{_number(x)},{_number(y)}" for x, y in points))
        return shape

    def text(self, x: float, y: float, text: str, anchor: Anchor = "start", style: str = "tick") -> None:
        shape = self._add("text", style, None, x=x, y=y)
        if anchor != "start":
            shape.set("text-anchor", anchor)
        shape.text = printable(text)

    def markup(self) -> Markup:
        return Markup(ET.tostring(self._root, encoding="unicode"))

    def _add(self, tag: str, style: str, label: str | None, **lengths: float) -> ET.Element:
        shape = ET.SubElement(self._root, tag, {"class": style} if style else {})
        for name, value in lengths.items():
            shape.set(name, _number(value))
        if label is not None:
            ET.SubElement(shape, "title").text = printable(label)
        return shape


def round_ticks(most: float, count: int, *, whole: bool = False) -> list[float]:
    """0 and up to about `count` round numbers above it, the last of them no less than `most`. `whole`: no fractions.

    >>> round_ticks(87, 4)
    [0.0, 50.0, 100.0]
    """
    least = max(most, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))
    if whole:
        step = max(1.0, math.ceil(step))
    return [number * step for number in range(math.ceil(most / step - 1e-9) + 1)] if most > 0 else [0.0, step]


def short_number(value: float) -> str:
    """As an axis has it: 1234567 -> '1.23M', 1850.3 -> '1,850', 0.25 -> '0.25'."""
    for least, unit, name in ((999.5e6, 1e9, "G"), (999.5e3, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / unit:.3g}{name}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
