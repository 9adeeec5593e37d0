"""Where a command's answer goes, and its exit status: 0 done, 1 failed, 2 wrongly asked, 130 interrupted."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Any, Final, TextIO

from jobs.terminal import say, write_json

INTERRUPTED: Final = 130


class Answers:
    """Words for people, or with --json one document, on standard output."""

    def __init__(self, arguments: Sequence[str], json_stream: TextIO | None) -> None:
        self.command_line = shlex.join(["gristmill", *arguments])
        self._json_stream = json_stream
        self.has_refused = False

    def answer(self, document: Any, words: str) -> None:
        if self._json_stream is not None:
            write_json(document, self._json_stream)
            return
        try:
            print(words)
        except UnicodeEncodeError:  # of a terminal that is not UTF-8
            encoding = sys.stdout.encoding
            print(words.encode(encoding, "replace").decode(encoding))

    def refuse(self, message: str, exit_status: int) -> int:
        self.has_refused = True
        say(f"gristmill: {message}")
        if self._json_stream is not None:
            write_json({"error": " ".join(message.split()), "exit_status": exit_status}, self._json_stream)
        return exit_status

    def stopped(self, stop: BaseException, again: str | None = None) -> int:
        """Says how to go on: with `again`, or else the same command."""
        if isinstance(stop, SystemExit) and stop.code != signal.SIGTERM:  # as Ray answers SIGTERM while it starts
            raise stop
        return self.refuse(f"stopped; what is done is kept. To go on: {again or self.command_line}", INTERRUPTED)
