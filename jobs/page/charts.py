"""Figures of how long texts were, how fast rows went, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

from markupsafe import Markup

from jobs.page.axes import Axes
from jobs.page.canvas import CHAR_WIDTH, Canvas, round_ticks, short_number
from jobs.terminal import human_seconds

NUM_STRETCHES: Final = 60  # of time, in the figure of throughput
_ROUND_SECONDS: Final = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400, 604800)
_HALF_WIDTH, _WIDTH, _HEIGHT = 460.0, 940.0, 200.0


def histogram(title: str, counts: Sequence[int], edges: Sequence[int], *, unit: str) -> Markup:
    """Bars for `counts`, bar i holding values from edges[i] up to, not including, edges[i + 1]."""
    canvas = Canvas(
        _HALF_WIDTH, _HEIGHT, title=f"{title}: {sum(counts):,} in all, from {edges[0]:,} to {edges[-1] - 1:,}"
    )
    ticks = round_ticks(max(counts), 4, whole=True)
    axes = Axes(canvas=canvas, low_x=edges[0], high_x=edges[-1], high_y=ticks[-1])
    axes.mark_y(ticks)
    for count, (low, after) in zip(counts, pairwise(edges), strict=True):
        name = f"{low:,}" if after - low == 1 else f"{low:,} to {after - 1:,}"
        x, width = axes.x(low), axes.x(after) - axes.x(low)
        # The whole column answers to the pointer: a bar of one row is hard to hit.
        canvas.rect(x + width * 0.06, axes.y(count), width * 0.88, axes.floor - axes.y(count), "bar")
        canvas.rect(x, axes.top, width, axes.floor - axes.top, "column", f"{name} {unit}: {count:,}")
    every = -(-len(counts) // 8)
    if edges[1] - edges[0] == 1:  # a bar is one number, which stands below its middle
        for low in edges[:-1:every]:
            canvas.text(axes.x(low + 0.5), axes.floor + 15, f"{low:,}", "middle")
    else:
        axes.mark_x(edges[::every], lambda value: f"{value:,.0f}")
    axes.name_x(unit)
    return canvas.markup()


def throughput(runs: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Tokens read and generated a second, over the time in which rows ran, one run after the other.

    None where no run lasted long enough to have a speed. What is pointed at says the rows a second too.
    """
    every = [run["series"] for run in runs]
    parts = [one for one in every if one["seconds"] and one["seconds"][-1] > one["seconds"][0]]
    if not parts:
        return None
    end = sum(series["seconds"][-1] for series in parts)
    bins: list[tuple[float, float, int, dict[str, float]]] = []  # from, to, run, what happened a second
    begin, stretch = 0.0, end / NUM_STRETCHES
    for number, series in enumerate(parts):
        bins += [(begin + low, begin + high, number, rates) for low, high, rates in _rates(series, stretch)]
        begin += series["seconds"][-1]
    canvas = Canvas(_WIDTH, _HEIGHT + 20, title="Tokens a second over time", style="broad")
    most = max(rates["prompt_tokens"] + rates["completion_tokens"] for *_, rates in bins)
    ticks = round_ticks(most, 4)
    axes = Axes(canvas=canvas, low_x=0.0, high_x=end, high_y=ticks[-1])
    axes.mark_y(ticks)
    named_up_to = 0.0
    for number in range(len(parts)):
        mine = [(low, high, rates) for low, high, owner, rates in bins if owner == number]
        read = [(x, rates["prompt_tokens"]) for low, high, rates in mine for x in (low, high)]
        both = [
            (x, rates["prompt_tokens"] + rates["completion_tokens"]) for low, high, rates in mine for x in (low, high)
        ]
        _area(axes, read, [(x, 0.0) for x, _ in read], "area first")
        _area(axes, both, read, "area second")
        if number:
            x = axes.x(mine[0][0])
            canvas.line((x, axes.top), (x, axes.floor), "seam")
            if x > named_up_to:
                is_last = x > canvas.width - 60
                canvas.text(x - 4 if is_last else x + 4, axes.top + 9, "resumed", "end" if is_last else "start")
                named_up_to = x + 60
    for low, high, _, rates in bins:
        label = (
            f"{human_seconds(low)} to {human_seconds(high)}: {rates['prompt_tokens']:,.0f} tokens/s read, "
            f"{rates['completion_tokens']:,.0f} generated, {short_number(rates['rows'])} rows/s"
        )
        canvas.rect(axes.x(low), axes.top, axes.x(high) - axes.x(low), axes.floor - axes.top, "column", label)
    step = next(step for step in _ROUND_SECONDS if end / step <= 8 or step == _ROUND_SECONDS[-1])
    axes.mark_x([number * step for number in range(int(end / step) + 1)], human_seconds)
    axes.name_x("time at work on rows")
    return canvas.markup()


def _area(axes: Axes, upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]], style: str) -> None:
    outline = [*upper, *reversed(lower)]
    axes.canvas.path([(axes.x(x), axes.y(y)) for x, y in outline], style, closed=True)


def _rates(series: Mapping[str, Sequence[float]], stretch: float) -> list[tuple[float, float, dict[str, float]]]:
    """(from, to, what happened a second) in stretches of `stretch` seconds or more, from counts since a run began."""
    seconds, bounds = series["seconds"], [0]
    for place in range(1, len(seconds)):
        if seconds[place] - seconds[bounds[-1]] >= stretch:
            bounds.append(place)
    if len(bounds) > 1 and seconds[-1] - seconds[bounds[-1]] < stretch / 2:
        bounds.pop()  # a rest too short to have a speed of its own
    bounds.append(len(seconds) - 1)
    found: list[tuple[float, float, dict[str, float]]] = []
    for before, after in pairwise(bounds):
        length = seconds[after] - seconds[before]
        rates = {
            name: max(series[name][after] - series[name][before], 0) / length
            for name in ("rows", "prompt_tokens", "completion_tokens")
        }
        found.append((seconds[before], seconds[after], rates))
    return found


def shares(title: str, parts: Mapping[str, float], *, say: str = "count") -> Markup:
    """One bar cut by how much each part is of the whole, and its parts' names below. `say`: count or seconds."""
    whole = sum(parts.values()) or 1.0
    told = {name: human_seconds(value) if say == "seconds" else f"{value:,.0f}" for name, value in parts.items()}
    canvas = Canvas(
        _HALF_WIDTH, 26 + 18 * -(-len(parts) // 2), title=f"{title}: {', '.join(f'{n} {t}' for n, t in told.items())}"
    )
    x = 0.0
    for number, (name, value) in enumerate(parts.items()):
        width = value / whole * canvas.width
        label = f"{name}: {told[name]} ({value / whole:.1%})"
        canvas.rect(x, 0, max(width - 1.5, 0.5), 16, f"fill-{number % 10}", label)
        x += width
        at_x, at_y = number % 2 * canvas.width / 2, 36.0 + number // 2 * 18
        canvas.rect(at_x, at_y - 9, 10, 10, f"fill-{number % 10}")
        room = int((canvas.width / 2 - 16) / CHAR_WIDTH)
        canvas.text(at_x + 16, at_y, label if len(label) <= room else label[: room - 1] + "…")
    return canvas.markup()
