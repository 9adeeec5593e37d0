"""The field of a figure in which values have places: its edges, its scales, the numbers beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jobs.page.canvas import Anchor, Canvas, short_number


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Maps x from `low_x` to `high_x` and y from `low_y` to `high_y` into a canvas, with room for what is written."""

    canvas: Canvas
    low_x: float
    high_x: float
    high_y: float
    low_y: float = 0.0
    left: float = 46.0
    right: float = 10.0
    top: float = 12.0
    bottom: float = 34.0

    def x(self, value: float) -> float:
        share = (value - self.low_x) / ((self.high_x - self.low_x) or 1.0)
        return self.left + share * (self.canvas.width - self.left - self.right)

    def y(self, value: float) -> float:
        share = (value - self.low_y) / ((self.high_y - self.low_y) or 1.0)
        return self.floor - share * (self.floor - self.top)

    @property
    def floor(self) -> float:
        """Where the least y is."""
        return self.canvas.height - self.bottom

    def mark_y(self, ticks: Sequence[float], say: Callable[[float], str] = short_number) -> None:
        for tick in ticks:
            self.canvas.line(
                (self.left, self.y(tick)),
                (self.canvas.width - self.right, self.y(tick)),
                "axis" if tick == 0 else "grid",
            )
            self.canvas.text(self.left - 6, self.y(tick) + 4, say(tick), "end")

    def mark_x(self, ticks: Sequence[float], say: Callable[[float], str] = short_number) -> None:
        """The outermost numbers are kept inside the figure."""
        for tick in ticks:
            place = self.x(tick)
            anchor: Anchor = "start" if place < self.left + 8 else "end" if place > self.canvas.width - 24 else "middle"
            self.canvas.text(place, self.floor + 15, say(tick), anchor)

    def name_x(self, name: str) -> None:
        self.canvas.text((self.left + self.canvas.width - self.right) / 2, self.canvas.height - 4, name, "middle")
