"""Plain text: a document a line, or a document a file."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from pipeline.errors import JobError, RowError, one_line
from pipeline.formats.base import MAX_BATCH_ROWS, MAX_RECORD_BYTES, Chunk, FileScan, InputFile, Position, ScanLimits
from pipeline.formats.line_records import line_cursor, scan_lines
from pipeline.formats.lines import open_bytes
from pipeline.formats.records import RecordCursor
from pipeline.locations import locate

_TOO_LONG = RowError("malformed_record", f"longer than {MAX_RECORD_BYTES} bytes")

TEXT_COLUMN = "text"
PATH_COLUMN = "path"


class TextLinesFormat:
    """Each line that is not blank is a row with the one column `text`."""

    name = "lines"
    title = "text, a row a line"
    one_row_per_file = False

    def scan(self, path: str, limits: ScanLimits) -> FileScan:
        return scan_lines(path, limits, lambda _: pa.schema([pa.field(TEXT_COLUMN, pa.string())]))

    def open(
        self, files: Sequence[InputFile], index: int, columns: pa.Schema, *, row: int, start: Position, max_bytes: int
    ) -> RecordCursor[bytes | None]:
        def build(lines: list[bytes | None], first_row: int) -> Chunk:
            return _chunk([_TOO_LONG if line is None else line.removesuffix(b"\r") for line in lines], [], columns)

        return line_cursor(locate(files[index].path), build, row=row, start=start, max_bytes=max_bytes)


class TextFilesFormat:
    """Each file is a row: `text`, and its `path`."""

    name = "text"
    title = "text, a row a file"
    one_row_per_file = True

    def scan(self, path: str, limits: ScanLimits) -> FileScan:
        schema = pa.schema([pa.field(TEXT_COLUMN, pa.string()), pa.field(PATH_COLUMN, pa.string())])
        return FileScan(num_rows=1, schema=schema, locate=lambda row: {})

    def open(
        self, files: Sequence[InputFile], index: int, columns: pa.Schema, *, row: int, start: Position, max_bytes: int
    ) -> TextFilesCursor:
        return TextFilesCursor(files, columns, row, max_bytes)


class TextFilesCursor:
    """Here `row` counts files."""

    def __init__(self, files: Sequence[InputFile], columns: pa.Schema, row: int, max_bytes: int) -> None:
        self._files = files
        self._columns = columns
        self._max_bytes = max_bytes
        self.row = row

    def read(self, num_rows: int) -> Chunk:
        documents: list[bytes | RowError] = []
        size = 0
        files = self._files[self.row : self.row + min(num_rows, MAX_BATCH_ROWS)]
        for file in files:
            if documents and size + file.size_bytes > self._max_bytes:
                break
            document = _read_document(file)
            documents.append(document)
            size += 0 if isinstance(document, RowError) else len(document)
            if size > self._max_bytes:
                break
        self.row += len(documents)
        return _chunk(documents, [file.path for file in files[: len(documents)]], self._columns)

    def skip(self, num_rows: int) -> None:
        self.row += num_rows

    def reaches(self, row: int, start: Position) -> bool:
        return row == self.row

    def close(self) -> None:
        pass


def _read_document(file: InputFile) -> bytes | RowError:
    place = locate(file.path)
    try:
        if place.info().size != file.size_bytes:
            raise JobError(f"input {file.path} has changed since the job was planned")
        with open_bytes(place) as stream:
            document: bytes = stream.read(MAX_RECORD_BYTES + 1)
    except (OSError, pa.ArrowException) as error:
        raise JobError(f"input {file.path}: {one_line(error)}") from error
    if document.startswith((b"\xff\xfe", b"\xfe\xff")):
        return RowError("not_text", f"{file.path} is UTF-16; convert it to UTF-8")
    return document.removeprefix(b"\xef\xbb\xbf") if len(document) <= MAX_RECORD_BYTES else _TOO_LONG


def _chunk(texts: Sequence[bytes | RowError], paths: Sequence[str], columns: pa.Schema) -> Chunk:
    errors = {offset: text for offset, text in enumerate(texts) if isinstance(text, RowError)}
    values: list[bytes | None] = [None if isinstance(text, RowError) else text for text in texts]
    try:
        array = pa.array(values, pa.string())
    except pa.ArrowInvalid:
        for offset, value in enumerate(values):
            if value is not None and not _is_utf8(value):
                errors[offset] = RowError("not_text", "not valid UTF-8")
                values[offset] = None
        array = pa.array(values, pa.string())
    arrays = [array if field.name == TEXT_COLUMN else pa.array(paths, pa.string()) for field in columns]
    return Chunk(batch=pa.RecordBatch.from_arrays(arrays, schema=columns), errors=errors)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
