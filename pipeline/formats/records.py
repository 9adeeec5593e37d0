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

    `build(records, row)` makes a chunk of records whose first is `row` of the file. `seekable`: whether another place
    in the file can be jumped to, so that there is no point in going on to it from here.
    """

    def __init__(
        self,
        name: str,
        file: pa.NativeFile,
        records: Iterator[tuple[int, Record]],
        build: Callable[[list[Record], int], Chunk],
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
        self._max_bytes = max_bytes
        self._seekable = seekable
        self._held: tuple[int, Record] | None = None
        self.row = row - start["skip"]
        self.skip(start["skip"])

    def read(self, num_rows: int) -> Chunk:
        first, record = self._next()
        records = [record]
        while len(records) < min(num_rows, MAX_BATCH_ROWS):
            offset, record = self._next()
            if offset - first > self._max_bytes:
                self._held = (offset, record)
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

    def _next(self) -> tuple[int, Record]:
        if self._held is not None:
            held, self._held = self._held, None
            return held
        try:
            item = next(self._records, None)
        except (OSError, pa.ArrowException) as error:
            raise JobError(f"input {self._name}: {error}") from error
        if item is None:
            raise JobError(f"input {self._name} has changed: it holds fewer records than when the job was planned")
        return item
