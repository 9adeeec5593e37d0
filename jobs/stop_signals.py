"""SIGINT and SIGTERM, which ask a command to stop.

`timeout` and many a supervisor signal a process and at once its whole group, which it is in. That is one wish, while a
second Ctrl-C is another: not to wait any longer.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
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
    _set_handler(_interrupt)
    # Python runs this after whatever is registered later, and then gives signals their default back, which would
    # end a process that a last signal reaches with the signal's status instead of its own.
    atexit.register(_set_handler, signal.SIG_IGN)


def expect_end(exit_status: int) -> None:
    """All is said, and the process is about to end: a signal ends it at once, with this status and no traceback."""

    def end(number: int, frame: Any) -> None:
        if not is_echo():
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(exit_status)

    _set_handler(end)


def _set_handler(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _interrupt(number: int, frame: Any) -> None:
    if not is_echo():
        raise KeyboardInterrupt
