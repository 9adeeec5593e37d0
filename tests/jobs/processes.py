"""Processes that Ray starts, some of which end while one looks at them."""

from __future__ import annotations

import time
from collections.abc import Iterable

import psutil


def title(process: psutil.Process) -> str:
    """That of an actor is `ray::` and its class, whichever thread it was in. Empty once the process has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def actors_of(kind: str, process: psutil.Process | None = None) -> list[psutil.Process]:
    """The actors of the class `kind` among what `process` (else this one) started."""
    started = (process or psutil.Process()).children(recursive=True)
    return [child for child in started if title(child).startswith(f"ray::{kind}")]


def outliving(processes: Iterable[psutil.Process], timeout_s: float = 60.0) -> list[psutil.Process]:
    """Those that have not ended within this time. A zombie has, also where nobody reaps it, as in some containers."""
    deadline = time.monotonic() + timeout_s
    while (alive := [process for process in processes if _is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
