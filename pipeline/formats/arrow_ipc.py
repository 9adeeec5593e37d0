"""Arrow IPC (Feather 2) files and streams: rows found by record batch.

Local files are mapped, so that a slice of a record batch costs the slice; what is handed out is copied, so that nothing
keeps the map. A compressed record batch has to be unpacked whole: the cursor keeps it from one split to the next.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from pipeline.columns import conform, plain_field
from pipeline.errors import JobError, UserError, one_line
from pipeline.formats.base import MAX_BATCH_ROWS, Chunk, FileScan, InputFile, Position, ScanLimits
from pipeline.locations import Place, locate

_FILE_MAGIC = b"ARROW1"
_FEATHER_1_MAGIC = b"FEA1"


class ArrowFormat:
    name = "arrow"
    title = "Arrow IPC"
    one_row_per_file = False

    def scan(self, path: str, limits: ScanLimits) -> FileScan:
        try:
            source = _Source(locate(path))
            schema = _schema(source.file)
            mapped = source.is_mapped and _is_plain(source)
            lightest = min(range(len(schema)), key=lambda index: _weight(schema.field(index).type), default=0)
            starts = [0]
            for batch in _batches(source.file, None if mapped else [lightest], first=0):
                starts.append(starts[-1] + batch.num_rows)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"input {path}: not a readable Arrow IPC file ({one_line(error)})") from error

        def position(row: int) -> Position:
            index = bisect_right(starts, row) - 1
            return {"batch": index, "skip": row - starts[index], "mapped": int(mapped)}

        return FileScan(
            num_rows=starts[-1], schema=pa.schema([plain_field(field) for field in schema]), locate=position
        )

    def open(
        self, files: Sequence[InputFile], index: int, columns: pa.Schema, *, row: int, start: Position, max_bytes: int
    ) -> ArrowCursor:
        return ArrowCursor(files[index], columns, row, start, max_bytes)


class ArrowCursor:
    """Reads on from one record batch to the next."""

    def __init__(self, file: InputFile, columns: pa.Schema, row: int, start: Position, max_bytes: int) -> None:
        self._name = file.path
        self._columns = columns
        self._max_bytes = max_bytes
        self._source = _Source(locate(file.path))
        schema = _schema(self._source.file)
        mapped = start["mapped"] and self._source.is_mapped
        for name in columns.names:
            schema.field(name)  # KeyError where it is not there
        fields = None if mapped else [schema.get_field_index(name) for name in columns.names]
        self._index = start["batch"] - 1  # of the record batch at hand
        self._batches = _batches(self._source.file, fields, first=start["batch"])
        self._end = self.row = row - start["skip"]  # the row behind the record batch at hand
        self._batch = pa.RecordBatch.from_pylist([], schema=columns)
        self.skip(start["skip"])

    def read(self, num_rows: int) -> Chunk:
        while self.row == self._end:
            self._next_batch()
        num_rows = min(num_rows, MAX_BATCH_ROWS, self._end - self.row, max(1, self._max_bytes // self._largest_value))
        piece = self._batch.slice(self._batch.num_rows - (self._end - self.row), num_rows)
        while piece.num_rows > 1 and piece.nbytes > self._max_bytes:
            piece = piece.slice(0, piece.num_rows // 2)
        self.row += piece.num_rows
        chunk = conform(piece, self._columns)
        chunk = Chunk(batch=_copied(chunk.batch), errors=chunk.errors)
        self._source.forget()
        return chunk

    def skip(self, num_rows: int) -> None:
        target = self.row + num_rows
        while target > self._end:
            self._next_batch()
        self.row = target

    def reaches(self, row: int, start: Position) -> bool:
        return row == self.row or (row > self.row and start["batch"] == self._index)

    def close(self) -> None:
        self._batch = self._batch.slice(0, 0)
        self._batches = iter(())
        self._source.file.close()

    def _next_batch(self) -> None:
        try:
            batch = next(self._batches, None)
        except (OSError, pa.ArrowException) as error:
            raise JobError(f"input {self._name}: {one_line(error)}") from error
        if batch is None:
            raise JobError(f"input {self._name} has changed: it holds fewer rows than when the job was planned")
        self._batch = batch.select(self._columns.names)
        self._index += 1
        self.row = self._end
        self._end += batch.num_rows
        self._largest_value = max(1, sum(_largest_shared(column) for column in self._batch.columns))


class _Source:
    """The bytes of a file: mapped where it is local, so that what is not touched is not read."""

    def __init__(self, place: Place) -> None:
        self._map: mmap.mmap | None = None
        if place.is_local:
            with open(place.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.file: pa.NativeFile = pa.BufferReader(pa.py_buffer(self._map))
        else:
            self.file = place.filesystem.open_input_file(place.path)

    @property
    def is_mapped(self) -> bool:
        return self._map is not None

    def holds(self, buffer: pa.Buffer) -> bool:
        """Whether the buffer is a piece of the mapped file."""
        assert self._map is not None
        whole = pa.py_buffer(self._map)
        return whole.address <= buffer.address < whole.address + whole.size

    def forget(self) -> None:
        """Give back the memory that mapped pages take; they are read again when touched again."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


def _schema(source: pa.NativeFile) -> pa.Schema:
    reader = pa.ipc.open_file(source) if _is_file(source) else pa.ipc.open_stream(source)
    return reader.schema


def _is_plain(source: _Source) -> bool:
    """Whether record batches are not compressed, by the first one: its buffers are then pieces of the mapped file."""
    batch = next((batch for batch in _batches(source.file, None, first=0) if batch.num_rows), None)
    buffers = [] if batch is None else [buffer for column in batch.columns for buffer in column.buffers() if buffer]
    return all(source.holds(buffer) for buffer in buffers if buffer.size)


def _batches(source: pa.NativeFile, fields: Sequence[int] | None, *, first: int) -> Iterator[pa.RecordBatch]:
    """The record batches from number `first` on, in the file's order: with just these fields, or None for all.

    Choosing fields makes pyarrow copy them even from a mapped file, where all of them cost nothing.
    """
    options = pa.ipc.IpcReadOptions(included_fields=sorted(set(fields or ())))
    if _is_file(source):
        reader = pa.ipc.open_file(source, options=options)
        for index in range(first, reader.num_record_batches):
            yield reader.get_batch(index)
    else:
        for index, batch in enumerate(pa.ipc.open_stream(source, options=options)):
            if index >= first:
                yield batch


def _is_file(source: pa.NativeFile) -> bool:
    """Whether this is the format with a footer; if not it is a stream. Leaves the source at its first byte."""
    source.seek(0)
    magic = source.read(len(_FILE_MAGIC))
    source.seek(0)
    if magic.startswith(_FEATHER_1_MAGIC):
        raise pa.ArrowInvalid("this is Feather version 1; write it again as version 2")
    return bool(magic == _FILE_MAGIC)


def _weight(kind: pa.DataType) -> int:
    """How much a column of this type costs to unpack, roughly."""
    return kind.bit_width if pa.types.is_primitive(kind) else 1 << 16


def _largest_shared(array: Any) -> int:
    """The bytes of the largest value among those that several rows may share; their size in memory says little then."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _largest_shared(array.storage)
    if pa.types.is_dictionary(kind):
        return _largest_value(array.dictionary)
    if pa.types.is_run_end_encoded(kind):
        return _largest_value(array.values)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1], dtype=np.int32)  # each view is four of these, its length first
        return int(views[::4][array.offset : array.offset + len(array)].max(initial=0))
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return int(array.values.nbytes)
    if pa.types.is_struct(kind):
        return sum(_largest_shared(array.field(index)) for index in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _largest_shared(array.values) * int(pc.max(pc.list_value_length(array)).as_py() or 0)
    return 0


def _largest_value(values: Any) -> int:
    if pa.types.is_string(values.type) or pa.types.is_binary(values.type) or pa.types.is_large_string(values.type):
        return int(pc.max(pc.binary_length(values)).as_py() or 0)
    return int(values.nbytes)


def _copied(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows in memory of their own."""
    return pa.ipc.read_record_batch(batch.serialize(), batch.schema)
