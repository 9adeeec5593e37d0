"""What every input format offers: a scan at planning time, and cursors that read rows from a position onwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import pyarrow as pa

from pipeline.errors import RowError

Position: TypeAlias = Mapping[str, int]  # where a split starts in its file; JSON-able, opaque outside its format

MAX_RECORD_BYTES = 256 << 20  # a JSON, CSV or text line longer than this is a malformed record, never held in memory
MAX_BATCH_ROWS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One file of the input, as it was when the job was planned.

    `path` is absolute, or a URI. `digest` is `sha256:HEX` of the bytes; where hashing them would cost too much (remote
    files and very large inputs) it is `size+mtime:BYTES+NANOSECONDS`.
    """

    path: str
    size_bytes: int
    num_rows: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive rows as a cursor read them. `errors` maps an offset in `batch` to why that row is unusable."""

    batch: pa.RecordBatch
    errors: dict[int, RowError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileScan:
    """What planning learned about one file. `locate(row)` is the position of that row, counted in the file."""

    num_rows: int
    schema: pa.Schema
    locate: Callable[[int], Position]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanLimits:
    """What planning may spend on one file.

    `max_marks`: positions remembered in a file without an index of its own. `sample_rows`: records looked at to learn
    the columns of a file that does not state them.
    """

    max_marks: int = 1 << 17
    sample_rows: int = 2000


class Cursor(Protocol):
    """A place in one file that moves forwards only. Not for use by two threads at once."""

    row: int  # the next row to be read, counted in the file

    def read(self, num_rows: int) -> Chunk:
        """At least one and at most `num_rows` rows, no more than fit the cursor's `max_bytes` (one always does)."""
        ...

    def skip(self, num_rows: int) -> None:
        """Move `num_rows` rows on."""
        ...

    def reaches(self, row: int, start: Position) -> bool:
        """Whether going on from here to `row` costs no more than opening the file at `start`."""
        ...

    def close(self) -> None: ...


class Format(Protocol):
    """A kind of file."""

    name: str
    title: str  # for people: "Parquet"
    one_row_per_file: bool  # splits then run over files, and row r is file r

    def scan(self, path: str, limits: ScanLimits) -> FileScan:
        """Count rows, learn the schema and where rows lie; UserError with the path when the file can't be read."""
        ...

    def open(
        self, files: Sequence[InputFile], index: int, columns: pa.Schema, *, row: int, start: Position, max_bytes: int
    ) -> Cursor:
        """A cursor at `row` of `files[index]`, which lies at `start`, yielding just these columns in these types."""
        ...
