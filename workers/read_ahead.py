"""Reading and tokenizing the next splits while the engine works on these: a thread of its own, and bounded."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

from workers.assignment import Assignment
from workers.preparation import TokenizedRows


class ReadAhead:
    """`read` turns an assignment into its rows, in order. What waits here is at most `max_rows` rows and a chunk more.

    The reading thread works whenever there is room; whoever takes the rows is never asked to wait for it.
    """

    def __init__(
        self,
        read: Callable[[Assignment], Iterator[TokenizedRows]],
        *,
        max_rows: int,
        max_tokens: int,
        on_begun: Callable[[], None],
    ) -> None:
        """`on_begun` is called, in the reading thread, when it begins an assignment."""
        self._read = read
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._on_begun = on_begun
        self._changed = threading.Condition()
        self._assignments: deque[Assignment] = deque()
        self._dropped: set[tuple[int, int]] = set()
        self._ready: deque[TokenizedRows] = deque()
        self._ready_rows = self._ready_tokens = 0
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def put(self, assignment: Assignment) -> None:
        with self._changed:
            self._assignments.append(assignment)
            self._changed.notify_all()

    def drop(self, index: int, revision: int) -> None:
        """Read no more of this assignment."""
        with self._changed:
            kept = [a for a in self._assignments if (a.index, a.revision) != (index, revision)]
            self._assignments = deque(kept)
            self._dropped.add((index, revision))
            self._ready = deque(rows for rows in self._ready if rows.work.identity != (index, revision))
            self._ready_rows = sum(len(rows.rows) for rows in self._ready)
            self._ready_tokens = sum(rows.num_tokens for rows in self._ready)
            self._changed.notify_all()

    @property
    def num_unread(self) -> int:
        """Assignments that nothing was read of yet."""
        return len(self._assignments)

    def take(self, timeout_s: float = 0.0) -> TokenizedRows | None:
        """The next rows, or None if there are none within the time. Raises what reading raised."""
        with self._changed:
            if not self._ready and self._error is None and timeout_s:
                self._changed.wait_for(lambda: self._ready or self._error or self._closed, timeout_s)
            if self._ready:
                rows = self._ready.popleft()
                self._ready_rows -= len(rows.rows)
                self._ready_tokens -= rows.num_tokens
                self._changed.notify_all()
                return rows
            if self._error is not None:
                raise self._error
            return None

    def close(self) -> None:
        """The thread ends as soon as it has read what it is reading."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while (assignment := self._next_assignment()) is not None:
                self._on_begun()
                for rows in self._read(assignment):
                    if not self._offer(rows):
                        break
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next_assignment(self) -> Assignment | None:
        with self._changed:
            self._changed.wait_for(lambda: self._assignments or self._closed)
            return None if self._closed else self._assignments.popleft()

    def _offer(self, rows: TokenizedRows) -> bool:
        """Waits for room. False if nothing more of this assignment is wanted."""
        identity = rows.work.identity
        with self._changed:
            self._changed.wait_for(lambda: self._has_room() or self._closed or identity in self._dropped)
            if self._closed or identity in self._dropped:
                return False
            self._ready.append(rows)
            self._ready_rows += len(rows.rows)
            self._ready_tokens += rows.num_tokens
            self._changed.notify_all()
            return True

    def _has_room(self) -> bool:
        return not self._ready or (self._ready_rows < self._max_rows and self._ready_tokens < self._max_tokens)
