"""What a command answers: one thing on standard output, or one line on standard error that says why not."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any, TextIO

from jobs.terminal import say, write_json


class Answers:
    """Where a command's answer goes: words for people, or with --json one document, on standard output."""

    def __init__(self, arguments: Sequence[str], json_stream: TextIO | None) -> None:
        self.command_line = shlex.join(["gristmill", *arguments])
        self._json_stream = json_stream
        self.has_refused = False

    def answer(self, document: Any, words: str) -> None:
        if self._json_stream is not None:
            write_json(document, self._json_stream)
        else:
            print(words)

    def refuse(self, message: str, exit_status: int) -> int:
        self.has_refused = True
        say(f"gristmill: {message}")
        if self._json_stream is not None:
            write_json({"error": " ".join(message.split()), "exit_status": exit_status}, self._json_stream)
        return exit_status
