"""How busy experts and ranks were, layer by layer: a cell is as dark as its load is above the layer's mean.

L layers, E columns: experts or ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from jobs.page.canvas import Canvas

MAX_ROWS: Final = 64
MAX_COLUMNS: Final = 64
_DARKEST: Final = 4.0  # times the mean; what is above looks the same
_FAINTEST: Final = 0.05  # of full colour: an idle cell is seen, too
_LEFT, _TOP, _BOTTOM, _RIGHT = 46.0, 4.0, 52.0, 10.0
_HALF_WIDTH, _WIDTH, _MOST_HEIGHT, _CELL = 460.0, 940.0, 420.0, 26.0
WIDE: Final = 17  # columns from which a figure takes the whole width

Ratios = NDArray[np.float64]


def heat_map(column: str, layers: Sequence[int], loads: Sequence[Sequence[int]]) -> Markup:
    """`loads` [L][E] of decoder layers `layers`; `column` is what a column is of: expert or rank.

    Where there are more than MAX_ROWS or MAX_COLUMNS, a cell stands for several and shows the busiest of them.
    """
    counts = np.asarray(loads, np.int64)
    means = counts.mean(axis=1, keepdims=True)
    ratios: Ratios = np.divide(counts, means, out=np.zeros(counts.shape), where=means > 0)
    down, across = -(-counts.shape[0] // MAX_ROWS), -(-counts.shape[1] // MAX_COLUMNS)
    num_rows, num_columns = -(-counts.shape[0] // down), -(-counts.shape[1] // across)
    whole = _WIDTH if counts.shape[1] >= WIDE else _HALF_WIDTH
    width = min((whole - _LEFT - _RIGHT) / num_columns, 2 * _CELL)
    height = min(_MOST_HEIGHT / num_rows, _CELL if num_rows < 12 else 16.0)
    canvas = Canvas(
        whole,
        _TOP + height * num_rows + _BOTTOM,
        title=f"Load of each {column} in {counts.shape[0]} layers; the busiest has {ratios.max():.2f} times the mean",
        style="broad" if whole == _WIDTH else "",
    )
    darkest = min(max(float(ratios.max()), 1.0), _DARKEST)
    for row in range(num_rows):
        for place in range(num_columns):
            cell = (slice(row * down, (row + 1) * down), slice(place * across, (place + 1) * across))
            layer, number = np.unravel_index(ratios[cell].argmax(), ratios[cell].shape)
            layer, number = layer + row * down, number + place * across
            ratio = float(ratios[layer, number])
            label = (
                f"layer {layers[layer]}, {column} {number}: {counts[layer, number]:,} tokens, {ratio:.2f} × the mean"
            )
            shape = canvas.rect(_LEFT + place * width, _TOP + row * height, width, height, "cell", label)
            shape.set("fill-opacity", f"{_opacity(ratio, darkest):.2f}")
    floor = _TOP + height * num_rows
    for row in range(0, num_rows, max(1, -(-num_rows * 14 // int(height * num_rows + 1)))):
        canvas.text(_LEFT - 6, _TOP + (row + 0.5) * height + 4, f"{layers[row * down]}", "end")
    for place in range(0, num_columns, max(1, -(-30 // int(width)) if width < 30 else 1)):
        canvas.text(_LEFT + (place + 0.5) * width, floor + 15, f"{place * across}", "middle")
    canvas.text(0, floor + 15, "layer")
    _scale(canvas, column, floor + 32, darkest)
    return canvas.markup()


def _opacity(ratio: float, darkest: float) -> float:
    return _FAINTEST + (1 - _FAINTEST) * min(ratio / darkest, 1.0)


def _scale(canvas: Canvas, column: str, y: float, darkest: float) -> None:
    """What the colours mean, and what a column is."""
    canvas.text(_LEFT, y + 10, f"{column}  ·  load over the layer's mean:")
    x, steps, width = _LEFT + 222, 16, 8.0
    canvas.text(x - 6, y + 10, "0", "end")
    for step in range(steps):
        shape = canvas.rect(x + step * width, y, width, 12, "cell")
        shape.set("fill-opacity", f"{_opacity((step + 0.5) / steps * darkest, darkest):.2f}")
    canvas.text(x + steps * width + 6, y + 10, f"{darkest:.2g}" + (" and more" if darkest == _DARKEST else ""))


def expert_maps(experts: dict[str, Any] | None) -> list[tuple[str, Markup, str, bool]]:
    """(title, figure, what is to be said of it, whether it is wide), for experts, and ranks where there are any."""
    if experts is None or not np.sum(experts["rows"]):
        return []
    counts = np.asarray(experts["rows"], np.int64)
    said = f"{counts.sum():,} choices of {counts.shape[1]} experts in {counts.shape[0]} layers, all runs together."
    idle = int((counts == 0).sum())
    if idle:
        said += f" {idle:,} experts of single layers were never chosen."
    found = [("Experts", heat_map("expert", experts["layers"], experts["rows"]), said, counts.shape[1] >= WIDE)]
    gangs = [gang for gang in experts["gangs"] if np.sum(gang["rows"])]
    if gangs:
        last = gangs[-1]
        drawing = heat_map("rank", experts["layers"], last["rows"])
        found.append(("Ranks", drawing, _balance(last, len(gangs)), len(last["nodes"]) >= WIDE))
    return found


def _balance(gang: dict[str, Any], num_gangs: int) -> str:
    balance = gang["balance"]
    said = f"The busiest rank computed {balance['achieved']:.2f} times the mean"
    if balance["predicted"] is not None:
        said += f" ({balance['predicted']:.2f} foretold)"
    said += f"; experts dealt out in turn: {balance['round_robin']:.2f}."
    return said + (f" Of {num_gangs} gangs this is the last, {gang['gang']}." if num_gangs > 1 else "")
