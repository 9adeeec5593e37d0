"""A cursor over files in which records follow one another, each known by the byte at which it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import pyarrow as pa

from pipeline.errors import JobError
from pipeline.formats.base import MAX_BATCH_ROWS, Chunk, Position

Record = TypeVar("Record")


class RecordCursor(Generic[Record]):
    """Cuts a run of (byte offset, record) into chunks.

    `build(records, row)` makes a chunk of records whose first is `row` of the file; `size_of(record)` is about what it
    will take in bytes. `seekable`: whether another place in the file can be jumped to, so that there is no point in
    going on to it from here.
    """

    def __init__(
        self,
        name: str,
        file: pa.NativeFile,
        records: Iterator[tuple[int, Record]],
        build: Callable[[list[Record], int], Chunk],
        size_of: Callable[[Record], int],
        *,
        row: int,
        start: Position,
        max_bytes: int,
        seekable: bool,
    ) -> None:
        self._name = name
        self._file = file
        self._records = records
        self._build = build
        self._size_of = size_of
        self._max_bytes = max_bytes
        self._seekable = seekable
        self._held: list[Record] = []  # read, and handed out next
        self.row = row - start["skip"]
        self.skip(start["skip"])

    def read(self, num_rows: int) -> Chunk:
        record = self._next()
        records = [record]
        size = self._size_of(record)
        while len(records) < min(num_rows, MAX_BATCH_ROWS):
            record = self._next()
            size += self._size_of(record)
            if size > self._max_bytes:
                self._held.append(record)
                break
            records.append(record)
        chunk = self._build(records, self.row)
        self.row += len(records)
        return chunk

    def skip(self, num_rows: int) -> None:
        for _ in range(num_rows):
            self._next()
        self.row += num_rows

    def reaches(self, row: int, start: Position) -> bool:
        return row >= self.row and (not self._seekable or row - self.row <= start["skip"])

    def close(self) -> None:
        self._file.close()

    def _next(self) -> Record:
        if self._held:
            return self._held.pop()
        try:
            item = next(self._records, None)
        except (OSError, pa.ArrowException) as error:
            raise JobError(f"input {self._name}: {error}") from error
        if item is None:
            raise JobError(f"input {self._name} has changed: it holds fewer records than when the job was planned")
        return item[1]
