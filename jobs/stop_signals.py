"""SIGINT and SIGTERM, which ask a command to stop.

`timeout` and many a supervisor signal a process and at once its whole group, which it is in. That is one wish, while a
second Ctrl-C is another: not to wait any longer.
"""

from __future__ import annotations

import signal
import time
from typing import Any

ECHO_S = 0.5

_last_s = float("-inf")


def is_echo() -> bool:
    """Whether such a signal came just before, so that this one adds nothing. Each handler asks, once a signal."""
    global _last_s
    before, _last_s = _last_s, time.monotonic()
    return _last_s - before < ECHO_S


def interrupt_on_signals() -> None:
    """From now on they raise KeyboardInterrupt. A SIGINT that is ignored, as in a shell's background, stays so."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)


def leave_signals_alone() -> None:
    """All is said, and the process is about to end: a signal ends it at once, without a traceback."""
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(number: int, frame: Any) -> None:
    if not is_echo():
        raise KeyboardInterrupt
