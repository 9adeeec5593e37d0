"""JSON Lines: an object a line. Columns are learnt from the first records of each file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

import pyarrow as pa

from pipeline.errors import RowError, UserError, one_line
from pipeline.formats.base import Chunk, FileScan, InputFile, Position, ScanLimits
from pipeline.formats.json_types import array_of, common_type, type_of
from pipeline.formats.line_records import line_cursor, scan_lines
from pipeline.formats.records import RecordCursor
from pipeline.locations import locate

_SAMPLE_BYTES = 8 << 20


class JsonLinesFormat:
    name = "jsonl"
    title = "JSON Lines, an object a line"
    one_row_per_file = False

    def scan(self, path: str, limits: ScanLimits) -> FileScan:
        return scan_lines(path, limits, lambda lines: _learn(path, lines))

    def open(
        self, files: Sequence[InputFile], index: int, columns: pa.Schema, *, row: int, start: Position, max_bytes: int
    ) -> RecordCursor[bytes | None]:
        place = locate(files[index].path)
        name = PurePosixPath(place.path).name

        def build(lines: list[bytes | None], first_row: int) -> Chunk:
            return _chunk(lines, columns, name, first_row)

        return line_cursor(place, build, row=row, start=start, max_bytes=max_bytes)


def _learn(path: str, lines: Iterable[bytes | None]) -> pa.Schema:
    kinds: dict[str, Counter[pa.DataType]] = {}
    size = 0
    for number, line in enumerate(lines):
        if number == 0 and line is not None and line.lstrip().startswith(b"["):
            raise UserError(f"input {path}: holds a JSON array, not an object a line; convert it (jq -c '.[]')")
        record = _parse(line)
        if isinstance(record, dict):
            for name, value in record.items():
                kinds.setdefault(name, Counter())[type_of(value)] += 1
        size += len(line or b"")
        if size > _SAMPLE_BYTES:
            break
    return pa.schema([pa.field(name, common_type(counts)) for name, counts in kinds.items()])


def _parse(line: bytes | None) -> dict[str, object] | RowError:
    if line is None:
        return RowError("malformed_record", "the line is too long")
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        return RowError("not_text", "not valid UTF-8")
    except (ValueError, RecursionError) as error:
        return RowError("malformed_record", f"not valid JSON ({one_line(error)})")
    if not isinstance(value, dict):
        return RowError("malformed_record", f"a JSON {type(value).__name__}, not an object")
    return value


def _chunk(lines: Sequence[bytes | None], columns: pa.Schema, name: str, first_row: int) -> Chunk:
    errors: dict[int, RowError] = {}
    values: list[list[object]] = [[] for _ in columns]
    wanted = list(zip(columns.names, values, strict=True))
    for offset, line in enumerate(lines):
        record = _parse(line)
        if isinstance(record, RowError):
            errors[offset] = RowError(record.code, f"{name}, record {first_row + offset}: {record.message}")
            record = {}
        for column, taken in wanted:  # the rest of a record may be large, and goes at once
            taken.append(record.get(column))
    arrays = [array_of(taken, field, errors) for taken, field in zip(values, columns, strict=True)]
    return Chunk(batch=pa.RecordBatch.from_arrays(arrays, schema=columns), errors=errors)
