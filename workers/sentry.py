"""A process beside a shard that loads, which ends the shard if somebody stops it (SIGSTOP).

While a model is loaded, silence says little: an import or a tensor that is read from a slow disk may hold the
interpreter for a minute. The kernel knows whether the process runs, and this is who asks it. That the shard is then
dead is noticed at once, as always. Once it is loaded its reports are its heartbeat, and the sentry leaves.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path

LOOK_S = 0.5
STOPPED_LOOKS = 8  # in a row: what was suspended together with the sentry, and goes on with it, was never seen stopped


class Sentry:
    """Watches this process until `leave`, or until it is gone. Nobody watches where the kernel doesn't tell."""

    def __init__(self) -> None:
        import subprocess

        self._process: subprocess.Popen[bytes] | None = None
        if _state(os.getpid()) is not None:
            # Isolated and without site-packages, so that it starts in a few milliseconds.
            command = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE)

    def leave(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.communicate()


def watch(pid: int) -> None:
    """Until standard input, a pipe from the process, is closed."""
    num_stopped = 0
    while not select.select([sys.stdin], [], [], LOOK_S)[0]:
        num_stopped = num_stopped + 1 if _state(pid) == "T" else 0
        if num_stopped >= STOPPED_LOOKS:
            os.kill(pid, signal.SIGKILL)
            return


def _state(pid: int) -> str | None:
    """By Linux's /proc: T is stopped by a signal, t by a debugger. None where there is no such process, or no /proc."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return line.rpartition(")")[2].split()[0]  # after the name, in which anything may stand


if __name__ == "__main__":
    watch(int(sys.argv[1]))
