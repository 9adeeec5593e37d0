"""report.html: the report as one page that needs nothing else, no script and no network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from jobs.terminal import human_seconds

_WIDTH, _HEIGHT, _MARGIN = 640, 180, 44

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #667085; --line: #d9dee7; --bar: #3b6fb6; --bad: #b3402f;
        --paper: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #344054; --bar: #7aa7e0; --bad: #ee8a7a; --paper: #14181f } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.soft { color: var(--soft) }
.bad { color: var(--bad) }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.2rem 0 }
.tile { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem 1rem; min-width: 8rem }
.tile b { display: block; font-size: 1.4rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
svg { max-width: 100%; height: auto }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif }
pre { background: color-mix(in srgb, var(--line) 35%, transparent); padding: .8rem; border-radius: .5rem;
      overflow-x: auto }
"""


def render(report: dict[str, Any], spec_yaml: str) -> str:
    """The page for a report as `jobs.report` makes it, and the job it is about.

    All text in it is escaped, since it may come from rows.
    """
    rows, tokens, runs = report["rows"], report["tokens"], report["runs"]
    state = "finished" if report["state"] == "finished" else f"{report['state']}: {rows['done']:,} of {rows['total']:,}"
    sections = [
        f"<h1>{_text(report['name'])}</h1><p class=soft>{_text(state)} · {_text(report['model'])}</p>",
        _tiles(
            [
                ("rows", f"{rows['done']:,}"),
                ("error rows", f"{rows['errors']:,}"),
                ("prompt tokens", f"{tokens['prompt']:,}"),
                ("generated tokens", f"{tokens['completion']:,}"),
                ("tokens/s, last run", f"{runs[-1]['tokens_per_s']:,.0f}" if runs else "–"),
                ("time, all runs", human_seconds(sum(run["elapsed_s"] for run in runs))),
            ]
        ),
        _errors(report["errors"], rows["errors"]),
        *(_throughput(number, run) for number, run in enumerate(runs, start=1) if len(run["series"]) > 1),
        _histogram("Prompt length in tokens", report["lengths"]["prompt_tokens"]),
        _histogram("Generation length in tokens", report["lengths"]["completion_tokens"]),
        _facts("How generations ended", report["finish_reasons"]),
        _facts("Index", report["index"] or {}),
        f"<h2>The job</h2><pre>{_text(spec_yaml)}</pre>",
    ]
    head = (
        f"<meta charset=utf-8><title>{_text(report['name'])} – Gristmill</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>"
    )
    return f"<!doctype html><html lang=en>{head}<body>{''.join(sections)}</body></html>\n"


def _text(value: object) -> str:
    return html.escape(str(value)).encode("utf-8", "replace").decode()


def _tiles(facts: Sequence[tuple[str, str]]) -> str:
    return f"<div class=tiles>{''.join(f'<div class=tile><b>{_text(v)}</b>{_text(k)}</div>' for k, v in facts)}</div>"


def _errors(errors: dict[str, Any], num_errors: int) -> str:
    if not num_errors:
        return "<h2>Errors</h2><p>No row failed.</p>"
    lines = "".join(
        f"<tr><td class=bad>{_text(code)}<td class=number>{found['count']:,}<td>"
        + "<br>".join(f"row {example['row']:,}: {_text(example['message'])}" for example in found["examples"])
        for code, found in errors.items()
    )
    return f"<h2>Errors</h2><table><tr><th>kind<th class=number>rows<th>the first of them{lines}</table>"


def _facts(title: str, facts: dict[str, Any]) -> str:
    if not facts:
        return ""
    lines = "".join(f"<tr><td>{_text(key)}<td>{_text(value)}" for key, value in facts.items())
    return f"<h2>{title}</h2><table>{lines}</table>"


def _throughput(number: int, run: dict[str, Any]) -> str:
    """Tokens a second between each two samples of (seconds, rows, tokens), both counted from the run's start."""
    series = run["series"]
    rates = [
        ((before[0] + after[0]) / 2, (after[2] - before[2]) / (after[0] - before[0]))
        for before, after in pairwise(series)
        if after[0] > before[0]
    ]
    if not rates:
        return ""
    top, end = max(rate for _, rate in rates) or 1.0, series[-1][0]
    points = " ".join(
        f"{_MARGIN + x / end * (_WIDTH - _MARGIN):.1f},{_HEIGHT - 20 - y / top * (_HEIGHT - 40):.1f}" for x, y in rates
    )
    drawing = (
        f"<polyline points='{points}' fill=none stroke='var(--bar)' stroke-width=2 />"
        f"<text x=0 y=24>{top:,.0f}</text><text x=0 y={_HEIGHT - 20}>0</text>"
        f"<text x={_MARGIN} y={_HEIGHT - 4}>0:00</text>"
        f"<text x={_WIDTH} y={_HEIGHT - 4} text-anchor=end>{human_seconds(end)}</text>"
    )
    return f"<h2>Tokens a second, run {number}</h2>{_svg(drawing, f'tokens a second over time, up to {top:,.0f}')}"


def _histogram(title: str, histogram: dict[str, list[int]]) -> str:
    """Bars for `counts`, bar i holding values from edges[i] up to, not including, edges[i + 1]."""
    counts, edges = histogram["counts"], histogram["edges"]
    if not sum(counts):
        return ""
    top, step = max(counts), (_WIDTH - _MARGIN) / len(counts)
    bars = []
    for number, count in enumerate(counts):
        x, height = _MARGIN + number * step, count / top * (_HEIGHT - 40)
        low, high = edges[number], edges[number + 1] - 1
        name = f"{low}" if low == high else f"{low}–{high}"
        place = f"x={x + 1:.1f} y={_HEIGHT - 20 - height:.1f} width={step - 2:.1f} height={height:.1f}"
        bars.append(f"<rect {place} fill='var(--bar)'><title>{name}: {count:,}</title></rect>")
        if number % max(1, len(counts) // 10) == 0:
            bars.append(f"<text x={x + step / 2:.1f} y={_HEIGHT - 4} text-anchor=middle>{edges[number]}</text>")
    scale = f"<text x=0 y=24>{top:,}</text><text x=0 y={_HEIGHT - 20}>0</text>"
    return f"<h2>{title}</h2>{_svg(''.join(bars) + scale, f'{title}, {sum(counts):,} in all')}"


def _svg(drawing: str, label: str) -> str:
    axis = f"<line x1={_MARGIN} y1={_HEIGHT - 20} x2={_WIDTH} y2={_HEIGHT - 20} stroke='var(--line)' />"
    return f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='{_text(label)}'>{axis}{drawing}</svg>"
