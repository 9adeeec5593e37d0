"""JSON Lines: an object a line. Columns are learnt from the first records of each file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import PurePosixPath

import pyarrow as pa

from pipeline.errors import RowError, UserError
from pipeline.formats.base import Chunk, FileScan, InputFile, Position, ScanLimits
from pipeline.formats.json_types import array_of, common_type, type_of
from pipeline.formats.lines import codec_of, mark_lines, open_bytes, read_lines, text_start
from pipeline.formats.records import RecordCursor
from pipeline.locations import locate, one_line

_SAMPLE_BYTES = 8 << 20


class JsonLinesFormat:
    name = "jsonl"
    title = "JSON Lines"
    one_row_per_file = False

    def scan(self, path: str, limits: ScanLimits) -> FileScan:
        place = locate(path)
        try:
            start = text_start(place)
            with open_bytes(place, start) as file:
                schema = _learn(path, (line for _, line in islice(read_lines(file, start), limits.sample_rows)))
            with open_bytes(place, start) as file:
                marks = mark_lines(file, start, limits.max_marks)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"input {path}: can't be read ({one_line(error)})") from error
        return FileScan(num_rows=marks.num_rows, schema=schema, locate=marks.position)

    def open(
        self, files: Sequence[InputFile], index: int, columns: pa.Schema, *, row: int, start: Position, max_bytes: int
    ) -> RecordCursor[bytes | None]:
        place = locate(files[index].path)
        name = PurePosixPath(place.path).name

        def build(lines: list[bytes | None], first_row: int) -> Chunk:
            return _chunk([_parse(line, f"{name}, record {first_row + i}") for i, line in enumerate(lines)], columns)

        file = open_bytes(place, start["byte"])
        return RecordCursor(
            place.name,
            file,
            read_lines(file, start["byte"]),
            build,
            row=row,
            start=start,
            max_bytes=max_bytes,
            seekable=codec_of(place.path) is None,
        )


def _learn(path: str, lines: Iterable[bytes | None]) -> pa.Schema:
    kinds: dict[str, Counter[pa.DataType]] = {}
    size = 0
    for number, line in enumerate(lines):
        if number == 0 and line is not None and line.lstrip().startswith(b"["):
            raise UserError(f"input {path}: holds a JSON array, not an object a line; convert it (jq -c '.[]')")
        record = _parse(line, path)
        if isinstance(record, dict):
            for name, value in record.items():
                kinds.setdefault(name, Counter())[type_of(value)] += 1
        size += len(line or b"")
        if size > _SAMPLE_BYTES:
            break
    return pa.schema([pa.field(name, common_type(counts)) for name, counts in kinds.items()])


def _parse(line: bytes | None, where: str) -> dict[str, object] | RowError:
    if line is None:
        return RowError("malformed_record", f"{where}: the line is too long")
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        return RowError("not_text", f"{where}: not valid UTF-8")
    except (ValueError, RecursionError) as error:
        return RowError("malformed_record", f"{where}: not valid JSON ({one_line(error)})")
    if not isinstance(value, dict):
        return RowError("malformed_record", f"{where}: a JSON {type(value).__name__}, not an object")
    return value


def _chunk(records: Sequence[dict[str, object] | RowError], columns: pa.Schema) -> Chunk:
    errors = {offset: record for offset, record in enumerate(records) if isinstance(record, RowError)}
    arrays = [
        array_of(
            [None if isinstance(record, RowError) else record.get(field.name) for record in records], field, errors
        )
        for field in columns
    ]
    return Chunk(batch=pa.RecordBatch.from_arrays(arrays, schema=columns), errors=errors)
