"""A process that dies at a chosen filesystem step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

STEPS = ("open", "write", "fsync", "link", "rename", "unlink", "mkdir", "rmdir", "ftruncate", "pwrite")


class Died(BaseException):
    """Stands for SIGKILL: no handler for errors sees it."""


class Filesystem:
    """Counts the calls of `os` that change or flush something, and dies at one of them.

    A step that dies is not done, but for a write, of which half is. Writes that follow each other count as one.
    `trace` names the steps, `before_step` is called before each. Nothing is really flushed: a process dies, not the
    machine.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trace: list[str] = []
        self.before_step: Callable[[], None] | None = None
        self.kill_for_real = False
        self._dies_at: int | None = None
        self._counting = False
        for name in STEPS:
            call = getattr(os, name) if name != "fsync" else lambda handle: None
            monkeypatch.setattr(os, name, self._step(name, call))

    @contextmanager
    def dies_at(self, step: int | None) -> Iterator[None]:
        """Within, the process dies when `step` steps are done; the block is left as if nothing had happened."""
        self.trace, self._dies_at, self._counting = [], step, True
        try:
            yield
        except Died:
            pass
        finally:
            self._counting = False

    @property
    def died(self) -> bool:
        return self._dies_at is not None and len(self.trace) >= self._dies_at

    def _step(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **kwargs: Any) -> Any:
            if self._counting and not (name == "write" and self.trace[-1:] == ["write"]):
                self._counting = False
                try:
                    if self.before_step is not None:
                        self.before_step()
                    if self.died:
                        if name == "write":
                            call(args[0], args[1][: len(args[1]) // 2])
                        if self.kill_for_real:
                            os.kill(os.getpid(), signal.SIGKILL)
                        raise Died
                finally:
                    self._counting = True
                self.trace.append(name)
            return call(*args, **kwargs)

        return stepped


@pytest.fixture
def filesystem(monkeypatch: pytest.MonkeyPatch) -> Filesystem:
    return Filesystem(monkeypatch)
