"""CSV and TSV: a header, then a record a line or, where quotes hold line ends, on several. All columns are text.

A quote that is never closed would swallow the rest of the file. So a record that does not end costs its first line,
which is a malformed record, and reading goes on with the next line.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import PurePosixPath
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from pipeline.errors import RowError, UserError, one_line
from pipeline.formats.base import Chunk, FileScan, InputFile, Position, ScanLimits
from pipeline.formats.lines import codec_of, open_bytes, read_lines, text_start
from pipeline.formats.marks import Marks
from pipeline.formats.records import RecordCursor
from pipeline.locations import Place, locate

MAX_CSV_RECORD_BYTES = 32 << 20

_MARK_RUN = 4096
_Record: TypeAlias = list[str] | RowError


class DelimitedFormat:
    name = "csv"
    title = "CSV"
    one_row_per_file = False

    def scan(self, path: str, limits: ScanLimits) -> FileScan:
        place = locate(path)
        marks = Marks(limits.max_marks)
        try:
            names, delimiter = _header(place)
            start = text_start(place)
            with open_bytes(place, start) as file:
                records = read_records(read_lines(file, start, blank=True), delimiter)
                next(records)  # the header
                while run := [offset for offset, _ in islice(records, _MARK_RUN)]:
                    marks.add(np.array(run))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"input {path}: can't be read ({one_line(error)})") from error
        schema = pa.schema([pa.field(name, pa.string()) for name in names])
        return FileScan(num_rows=marks.num_rows, schema=schema, locate=marks.position)

    def open(
        self, files: Sequence[InputFile], index: int, columns: pa.Schema, *, row: int, start: Position, max_bytes: int
    ) -> RecordCursor[_Record]:
        place = locate(files[index].path)
        names, delimiter = _header(place)
        index_of = {name: index for index, name in enumerate(names)}
        wanted = [index_of[field.name] for field in columns]
        name = PurePosixPath(place.path).name

        def build(records: list[_Record], first_row: int) -> Chunk:
            errors: dict[int, RowError] = {}
            for offset, record in enumerate(records):
                error = record if isinstance(record, RowError) else _miscounted(record, len(names))
                if error is not None:
                    where = f"{name}, record {first_row + offset}"
                    errors[offset] = RowError(error.code, f"{where}: {error.message}")
            rows = [[] if isinstance(record, RowError) else record for record in records]
            for offset in errors:
                rows[offset] = []
            arrays = [pa.array([row[index] if row else None for row in rows], pa.string()) for index in wanted]
            return Chunk(batch=pa.RecordBatch.from_arrays(arrays, schema=columns), errors=errors)

        file = open_bytes(place, start["byte"])
        return RecordCursor(
            place.name,
            file,
            read_records(read_lines(file, start["byte"], blank=True), delimiter),
            build,
            lambda record: 0 if isinstance(record, RowError) else sum(map(len, record)),
            row=row,
            start=start,
            max_bytes=max_bytes,
            seekable=codec_of(place.path) is None,
        )


def read_records(
    lines: Iterator[tuple[int, bytes | None]], delimiter: str, max_record_bytes: int = MAX_CSV_RECORD_BYTES
) -> Iterator[tuple[int, _Record]]:
    """(byte offset, fields) of each record that is not blank."""
    csv.field_size_limit(max(csv.field_size_limit(), max_record_bytes))
    feed = _Feed(lines, max_record_bytes)
    reader = csv.reader(feed, delimiter=delimiter)
    while True:
        feed.begin()
        try:
            fields = next(reader)
            problem = "a quote is never closed" if feed.ended else None
        except StopIteration:
            return
        except csv.Error as error:
            fields, problem = [], str(error)
        if problem is not None:
            yield feed.taken[0][0], RowError("malformed_record", problem)
            feed.give_back()
            reader = csv.reader(feed, delimiter=delimiter)
        elif feed.spoilt:
            yield feed.taken[0][0], RowError("not_text", "not valid UTF-8")
        elif len(fields) > 1 or (fields and (fields[0] == "" or not fields[0].isspace())):
            yield feed.taken[0][0], fields


class _Feed:
    """Hands lines to csv.reader and remembers those of the record at hand."""

    def __init__(self, lines: Iterator[tuple[int, bytes | None]], max_record_bytes: int) -> None:
        self._lines = lines
        self._max_record_bytes = max_record_bytes
        self._queue: deque[tuple[int, bytes | None]] = deque()
        self.begin()

    def begin(self) -> None:
        """The last record is done with."""
        self.taken: list[tuple[int, bytes | None]] = []
        self.spoilt = False  # the record holds bytes that are no UTF-8
        self.ended = False  # the record asked for more lines than there are

    def give_back(self) -> None:
        """Have all lines of this record but the first again."""
        self._queue.extendleft(reversed(self.taken[1:]))

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.taken and self.taken[-1][0] - self.taken[0][0] > self._max_record_bytes:
            raise csv.Error("a quote is not closed for too long")
        item = self._queue.popleft() if self._queue else next(self._lines, None)
        if item is None:
            self.ended = True
            raise StopIteration
        self.taken.append(item)
        if item[1] is None:
            raise csv.Error("the line is too long")
        try:
            return item[1].decode() + "\n"
        except UnicodeDecodeError:
            self.spoilt = True
            return item[1].decode(errors="surrogateescape") + "\n"


def _header(place: Place) -> tuple[list[str], str]:
    """The names of the columns, and what is between them: a comma if the first line has one, else tab, `;` or `|`."""
    start = text_start(place)
    with open_bytes(place, start) as file:
        line = next((line for _, line in read_lines(file, start)), None)
    if line is None:
        raise UserError(f"input {place.name}: empty; a CSV file begins with a line of column names")
    unquoted = re.sub(rb'"[^"]*"', b"", line)
    delimiter = next((mark.decode() for mark in (b",", b"\t", b";", b"|") if mark in unquoted), ",")
    with open_bytes(place, start) as file:
        _, header = next(read_records(read_lines(file, start, blank=True), delimiter))
    if isinstance(header, RowError):
        raise UserError(f"input {place.name}: the line of column names is unusable ({header.message})")
    names = [name.strip() or f"column_{index}" for index, name in enumerate(header, 1)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"input {place.name}: two columns are called `{twice}`")
    return names, delimiter


def _miscounted(fields: Sequence[str], num_columns: int) -> RowError | None:
    if len(fields) == num_columns:
        return None
    return RowError("malformed_record", f"{len(fields)} fields where the header names {num_columns}")
