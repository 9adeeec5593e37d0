"""Parquet: rows found by row group, decoded in runs so short that no run outgrows its bound.

A file of a few hundred bytes can decode to hundreds of megabytes, since a value that stands once in a column's
dictionary may be named by every row. So the rows decoded at a time follow from the largest value there can be, not from
the size of the file. pyarrow can't enter a row group midway: a cursor that has read one split goes on to the next, and
skips forwards where another worker took what lies between, so that no worker decodes a row group more than once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.columns import conform, joined, plain_field, unpacked
from pipeline.errors import JobError, RowError, UserError, one_line
from pipeline.formats.base import MAX_BATCH_ROWS, Chunk, FileScan, InputFile, Position, ScanLimits
from pipeline.locations import Place, locate

_LOCAL_BUFFER_BYTES = 1 << 20  # read ahead in each column; without a buffer pyarrow loads whole column chunks
_REMOTE_BUFFER_BYTES = 8 << 20
_MAX_RUN_ROWS = 256
_FIXED_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
_DICTIONARY_PAGE = 2


class ParquetFormat:
    name = "parquet"
    title = "Parquet"
    one_row_per_file = False

    def scan(self, path: str, limits: ScanLimits) -> FileScan:
        try:
            file = _open(locate(path))
            metadata, schema = file.metadata, file.schema_arrow
            file.close(force=True)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"input {path}: not a readable Parquet file ({one_line(error)})") from error
        starts = [0]
        for group in range(metadata.num_row_groups):
            starts.append(starts[-1] + metadata.row_group(group).num_rows)

        def position(row: int) -> Position:
            group = bisect_right(starts, row) - 1
            return {"row_group": group, "skip": row - starts[group]}

        return FileScan(num_rows=metadata.num_rows, schema=pa.schema([plain_field(f) for f in schema]), locate=position)

    def open(
        self, files: Sequence[InputFile], index: int, columns: pa.Schema, *, row: int, start: Position, max_bytes: int
    ) -> ParquetCursor:
        return ParquetCursor(files[index], columns, row, start, max_bytes)


class ParquetCursor:
    """Reads on from one row group to the next."""

    def __init__(self, file: InputFile, columns: pa.Schema, row: int, start: Position, max_bytes: int) -> None:
        self._place = locate(file.path)
        self._columns = columns
        self._max_bytes = max_bytes
        self._file = _open(self._place)
        self._metadata = self._file.metadata
        if self._metadata.num_rows != file.num_rows:
            found = f"{self._metadata.num_rows} rows now, {file.num_rows} when the job was planned"
            raise JobError(f"input {file.path} has changed: {found}")
        self.row = row - start["skip"]
        self._open_group(start["row_group"])
        self.skip(start["skip"])

    def read(self, num_rows: int) -> Chunk:
        num_rows = min(num_rows, MAX_BATCH_ROWS)
        pieces: list[pa.RecordBatch] = []
        count = size = 0
        while count < num_rows:
            run = self._run()
            if run is None:
                if not pieces:
                    return self._damaged(num_rows)
                break
            piece = run.slice(0, num_rows - count)
            size += piece.nbytes
            if pieces and size > self._max_bytes:
                break
            pieces.append(piece)
            count += piece.num_rows
            self._advance(piece.num_rows)
        return conform(joined(pieces), self._columns)

    def skip(self, num_rows: int) -> None:
        while num_rows:
            run = self._run()
            step = min(num_rows, run.num_rows if run is not None else self._group_end - self.row)
            self._advance(step)
            num_rows -= step

    def reaches(self, row: int, start: Position) -> bool:
        return row == self.row or (row > self.row and start["row_group"] == self._group)

    def close(self) -> None:
        self._file.close(force=True)

    def _open_group(self, group: int) -> None:
        self._group = group
        self._group_end = self.row + self._metadata.row_group(group).num_rows
        self._damage: str | None = None
        self._held: pa.RecordBatch | None = None
        run_rows = max(1, min(_MAX_RUN_ROWS, self._max_bytes // self._largest_row_bytes(group)))
        self._runs: Iterator[pa.RecordBatch] = self._file.iter_batches(
            batch_size=run_rows, row_groups=[group], columns=self._columns.names, use_threads=False
        )

    def _run(self) -> pa.RecordBatch | None:
        """Decoded rows from `row` on, without moving; None where the file is damaged."""
        while self.row == self._group_end:
            self._open_group(self._group + 1)
        if self._held is None and self._damage is None:
            try:
                self._held = unpacked(next(self._runs))
            except StopIteration:
                self._damage = "the row group ends early"
            except (OSError, pa.ArrowException) as error:
                if isinstance(error, OSError) and not (self._place.is_local and error.errno is None):
                    raise JobError(f"input {self._place.name}: {one_line(error)}") from error
                self._damage = one_line(error)
        return self._held

    def _advance(self, num_rows: int) -> None:
        self.row += num_rows
        if self._held is not None:
            self._held = self._held.slice(num_rows) if num_rows < self._held.num_rows else None

    def _damaged(self, num_rows: int) -> Chunk:
        """Rows that can't be decoded: from the first damaged run to the end of its row group."""
        num_rows = min(num_rows, self._group_end - self.row)
        error = RowError(
            "malformed_record", f"row group {self._group} of {self._place.name} is damaged: {self._damage}"
        )
        self._advance(num_rows)
        nulls = [pa.nulls(num_rows, field.type) for field in self._columns]
        batch = pa.RecordBatch.from_arrays(nulls, schema=self._columns)
        return Chunk(batch=batch, errors=dict.fromkeys(range(num_rows), error))

    def _largest_row_bytes(self, group: int) -> int:
        """What a row of the group can decode to: its dictionaries' largest values, else what rows take on average."""
        largest = average = 0
        row_group = self._metadata.row_group(group)
        num_rows = max(1, row_group.num_rows)
        for index in range(row_group.num_columns):
            column = row_group.column(index)
            if not any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in self._columns.names):
                continue
            per_row = -(-column.num_values // num_rows)  # more than one only in lists
            largest += per_row * self._largest_value_bytes(column, index)
            average += -(-column.total_uncompressed_size // num_rows)
        return max(1, largest, average)

    def _largest_value_bytes(self, column: pq.ColumnChunkMetaData, index: int) -> int:
        if column.physical_type != "BYTE_ARRAY":
            return _FIXED_WIDTHS.get(column.physical_type) or int(self._metadata.schema.column(index).length or 0)
        whole = int(column.total_uncompressed_size)
        if "DELTA_BYTE_ARRAY" in column.encodings:  # a value there is a prefix of the one before and a few bytes more
            return whole
        if not any("DICTIONARY" in encoding for encoding in column.encodings):
            return 0
        offset = column.dictionary_page_offset or column.data_page_offset
        with self._place.filesystem.open_input_file(self._place.path) as file:
            source: Any = file  # pyarrow's stubs lack the second argument of read_at
            size = _dictionary_bytes(bytes(source.read_at(24, offset)))
        return whole if size is None else size


def _open(place: Place) -> pq.ParquetFile:
    buffer_bytes = _LOCAL_BUFFER_BYTES if place.is_local else _REMOTE_BUFFER_BYTES
    source = place.filesystem.open_input_file(place.path)
    return pq.ParquetFile(source, buffer_size=buffer_bytes, pre_buffer=False)


def _dictionary_bytes(header: bytes) -> int | None:
    """The decoded size that a dictionary page's header states, None if this is none.

    Headers are Thrift structs in compact encoding that begin with two i32 fields, the page's type and its decoded size
    (https://parquet.apache.org/docs/file-format/metadata/); each is a byte 0x15 and a zigzag varint.
    """
    values: list[int] = []
    position = 0
    for _ in range(2):
        if position >= len(header) or header[position] != 0x15:
            return None
        position += 1
        value = shift = 0
        while position < len(header):
            byte = header[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        values.append((value >> 1) ^ -(value & 1))
    return values[1] if values[0] == _DICTIONARY_PAGE else None
