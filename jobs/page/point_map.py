"""The map of the corpus: a point a row, which says its text when it is pointed at."""

from __future__ import annotations

from html import escape
from typing import Final

from markupsafe import Markup

from jobs.corpus.corpus_map import CorpusMap, MapPoint
from jobs.page.canvas import Canvas, printable

# With these, two thousand points take less than 1.5 MB whatever their texts are.
TEXT_BYTES: Final = 420
GENERATION_BYTES: Final = 160
ID_BYTES: Final = 60
_WIDTH, _LEAST_HEIGHT, _MOST_HEIGHT, _MARGIN = 940.0, 360.0, 640.0, 12.0


def point_map(found: CorpusMap) -> Markup:
    """Both directions have the same scale; a smaller point stands for a denser map."""
    xs, ys = [point.x for point in found.points], [point.y for point in found.points]
    span_x, span_y = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
    height = min(max(_WIDTH * span_y / span_x, _LEAST_HEIGHT), _MOST_HEIGHT)
    strip = 34.0 if found.failed else 0.0
    scale = min((_WIDTH - 2 * _MARGIN) / span_x, (height - 2 * _MARGIN) / span_y)
    canvas = Canvas(_WIDTH, height + strip, title=f"Map of {len(found.points):,} rows by {found.method}", style="broad")
    middle_x, middle_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    radius = 3.2 if len(found.points) > 1000 else 4.0 if len(found.points) > 300 else 5.0
    for point in found.points:
        x, y = _WIDTH / 2 + (point.x - middle_x) * scale, height / 2 - (point.y - middle_y) * scale
        canvas.dot(x, y, radius, f"point fill-{point.group}", _label(point))
    if found.failed:
        canvas.text(0, height + 22, "failed:")
        for number, row in enumerate(found.failed):
            label = f"row {row.row:,}{_named(row.row, row.id)}\n{row.code}: {row.message}"
            canvas.dot(52 + number * 14.5, height + 18, 4.5, "failed", cut(label, TEXT_BYTES))
    return canvas.markup()


def _label(point: MapPoint) -> str:
    text = cut(" ".join(point.text.split()), TEXT_BYTES) or "(no text: its columns are not carried)"
    said = f"row {point.row:,}{_named(point.row, point.id)}\n{text}"
    if point.generation is not None:
        said += f"\n→ {cut(' '.join(point.generation.split()), GENERATION_BYTES)}"
    return said


def _named(row: int, id: str) -> str:
    return "" if id == str(row) else f" · {cut(id, ID_BYTES)}"


def cut(text: str, most_bytes: int) -> str:
    """The beginning of a text that takes at most so many bytes in the page, escapes counted; … for what is left out.

    >>> cut("a < b", 5)
    'a …'
    """
    text = printable(text[: most_bytes + 1])
    if len(escape(text, quote=False).encode()) <= most_bytes:
        return text
    room = most_bytes - len("…".encode())
    for end, letter in enumerate(text):
        room -= len(escape(letter, quote=False).encode())
        if room < 0:
            return text[:end] + "…"
    return text + "…"
