"""How much an index finds against how fast it is searched, for each effort that was tried when it was built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from markupsafe import Markup

from jobs.page.axes import Axes
from jobs.page.canvas import Canvas, round_ticks, short_number

MAX_SHARDS: Final = 12  # that have a line; more lines could not be told apart
_WIDTH, _HEIGHT = 460.0, 230.0
_NARROWEST: Final = 0.05  # of recall, that the figure shows


def recall_trials(index: Mapping[str, Any] | None, runs: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """For each shard of the index what was tried, by effort: {"effort", "recall", "queries_per_s", "chosen"}.

    Speeds are those of the last run that built it. None where it is exact, or no speed is known.
    """
    if index is None or not index["recall"]["num_queries"]:
        return []
    measured: list[dict[str, Any]] = next(
        (run["index_trials"] for run in reversed(runs) if run.get("index_trials")), []
    )
    num_queries = index["recall"]["num_queries"]
    shards: dict[str, list[dict[str, Any]]] = {}
    for trial in measured:
        if trial["kind"] == index["kind"] and trial["effort"] is not None and trial["seconds"] > 0:
            shards.setdefault(trial["shard"], []).append(
                {
                    "effort": trial["effort"],
                    "recall": trial["recall"],
                    "queries_per_s": num_queries / trial["seconds"],
                    "chosen": False,
                }
            )
    found = [sorted(shards[name], key=lambda trial: int(trial["effort"])) for name in sorted(shards)]
    for trials, kept in zip(found, index["efforts"], strict=False):
        for trial in trials:
            trial["chosen"] = trial["effort"] == kept["effort"]
    return found


def recall_chart(shards: Sequence[Sequence[Mapping[str, Any]]], target: float, k: int) -> Markup:
    """A line a shard, through what was tried: recall to the right, queries a second upwards."""
    trials = [trial for tried in shards[:MAX_SHARDS] for trial in tried]
    low = min([target, *(trial["recall"] for trial in trials)])
    low = max(math.floor(min(low, 1 - _NARROWEST) * 20) / 20, 0.0)
    ticks = round_ticks(max(trial["queries_per_s"] for trial in trials), 4)
    canvas = Canvas(_WIDTH, _HEIGHT, title=f"Recall of the {k} nearest against queries a second")
    axes = Axes(canvas=canvas, low_x=low, high_x=1.0, high_y=ticks[-1], right=16.0, top=18.0)
    axes.mark_y(ticks)
    steps = 5
    axes.mark_x([low + (1 - low) * step / steps for step in range(steps + 1)], lambda value: f"{value:.2f}")
    axes.name_x(f"share of the {k} nearest that are found")
    canvas.text(4, 10, "queries/s")
    canvas.line((axes.x(target), axes.top), (axes.x(target), axes.floor), "goal")
    canvas.text(axes.x(target) - 5, axes.top + 4, "asked for", "end")
    for number, tried in enumerate(shards[:MAX_SHARDS]):
        places = [(axes.x(trial["recall"]), axes.y(trial["queries_per_s"])) for trial in tried]
        canvas.path(places, "")
        for (x, y), trial in zip(places, tried, strict=True):
            label = f"effort {trial['effort']:,}: recall {trial['recall']:.3f}, "
            label += f"{short_number(round(trial['queries_per_s']))} queries/s"
            if len(shards) > 1:
                label = f"shard {number}, {label}"
            canvas.dot(
                x, y, 4.5, "chosen" if trial["chosen"] else "tried", label + (", chosen" if trial["chosen"] else "")
            )
    return canvas.markup()
