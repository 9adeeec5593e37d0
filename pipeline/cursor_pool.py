"""Cursors that stay open from one split to the next, where going on costs less than starting anew."""

from __future__ import annotations

import threading
from collections.abc import Hashable

from pipeline.formats.base import Cursor, Position

_NUM_IDLE = 4


class CursorPool:
    """Keeps the cursors that were used last. `key`: what a cursor reads, its file and columns."""

    def __init__(self) -> None:
        self._idle: list[tuple[Hashable, Cursor]] = []
        self._lock = threading.Lock()

    def take(self, key: Hashable, row: int, start: Position) -> Cursor | None:
        """A cursor at `row`, which lies at `start`, if one stands there or before it, and near enough to go on."""
        with self._lock:
            near = [entry for entry in self._idle if entry[0] == key and entry[1].reaches(row, start)]
            entry = max(near, key=lambda entry: entry[1].row, default=None)
            if entry is not None:
                self._idle.remove(entry)
        if entry is None:
            return None
        cursor = entry[1]
        cursor.skip(row - cursor.row)
        return cursor

    def put(self, key: Hashable, cursor: Cursor) -> None:
        """Keep a cursor that is not in use any more."""
        with self._lock:
            self._idle.append((key, cursor))
            oldest = self._idle.pop(0)[1] if len(self._idle) > _NUM_IDLE else None
        if oldest is not None:
            oldest.close()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for _, cursor in idle:
            cursor.close()
