"""Files in which each line that is not blank is a record: counting them, and reading on from one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

import pyarrow as pa

from pipeline.errors import UserError, one_line
from pipeline.formats.base import Chunk, FileScan, Position, ScanLimits
from pipeline.formats.lines import codec_of, mark_lines, open_bytes, read_lines, text_start
from pipeline.formats.records import RecordCursor
from pipeline.locations import Place, locate


def scan_lines(path: str, limits: ScanLimits, learn: Callable[[Iterable[bytes | None]], pa.Schema]) -> FileScan:
    """`learn` tells the columns from the first `limits.sample_rows` lines, None for one that is too long to hold."""
    place = locate(path)
    try:
        start = text_start(place)
        with open_bytes(place, start) as file:
            schema = learn(line for _, line in islice(read_lines(file, start), limits.sample_rows))
        with open_bytes(place, start) as file:
            marks = mark_lines(file, start, limits.max_marks)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"input {path}: can't be read ({one_line(error)})") from error
    return FileScan(num_rows=marks.num_rows, schema=schema, locate=marks.position)


def line_cursor(
    place: Place, build: Callable[[list[bytes | None], int], Chunk], *, row: int, start: Position, max_bytes: int
) -> RecordCursor[bytes | None]:
    """Lines from `start` on; `build` as in RecordCursor, with None for a line that is too long to hold."""
    file = open_bytes(place, start["byte"])
    return RecordCursor(
        place.name,
        file,
        read_lines(file, start["byte"]),
        build,
        lambda line: len(line or b""),
        row=row,
        start=start,
        max_bytes=max_bytes,
        seekable=codec_of(place.path) is None,
    )
