"""What a person sees: standard output kept clean for the answer, and one line or a progress bar on standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from jobs.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LINE_EVERY_S = 60.0


@contextlib.contextmanager
def reserved_stdout() -> Iterator[TextIO]:
    """The real standard output; meanwhile what anything else writes there, child processes too, goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as stream:
            yield stream
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def write_json(document: Any, stream: TextIO) -> None:
    """One document and a newline. Lone surrogates, which UTF-8 can't carry, are written as escapes."""
    try:
        stream.write(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")
    except UnicodeEncodeError:
        stream.write(json.dumps(document, allow_nan=False) + "\n")
    stream.flush()


def say(message: str) -> None:
    """One line on standard error, whatever the message holds."""
    print(" ".join(message.split()), file=sys.stderr, flush=True)


def human_bytes(num_bytes: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def human_seconds(seconds: float) -> str:
    """75 -> '1:15', 4000 -> '1:06:40'."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class ProgressDisplay:
    """A bar on a terminal; elsewhere one line a minute, so that a log tells how far the job is."""

    def __init__(self) -> None:
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._next_line_s = time.monotonic() + LINE_EVERY_S

    def __enter__(self) -> ProgressDisplay:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TextColumn("{task.fields[left]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None, speed="", left="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        if self._bar is not None:
            assert self._task is not None
            self._bar.update(
                self._task,
                description=progress.phase,
                completed=progress.rows_done,
                total=progress.rows_total,
                speed=f"{progress.tokens_per_s:,.0f} tokens/s",
                left="" if progress.left_s is None else f"{human_seconds(progress.left_s)} left",
            )
        elif time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + LINE_EVERY_S
            say(describe(progress))


def describe(progress: Progress) -> str:
    parts = [progress.phase, f"{progress.rows_done:,} of {progress.rows_total:,} rows"]
    if progress.error_rows:
        parts.append(f"{progress.error_rows:,} errors")
    parts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
    if progress.left_s is not None:
        parts.append(f"{human_seconds(progress.left_s)} left")
    return ", ".join(parts)
