"""Files of lines, compressed or not: finding where lines begin, and reading them from a byte onwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from pipeline.errors import UserError
from pipeline.formats.base import MAX_RECORD_BYTES
from pipeline.formats.marks import Marks
from pipeline.locations import Place

CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}

_CHUNK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK_BYTES = np.frombuffer(b" \t\r\n\v\f", dtype=np.uint8)
_NEWLINE = 10


def codec_of(path: str) -> str | None:
    """How a file is compressed, by the end of its name."""
    return CODECS.get(PurePosixPath(path).suffix.lower())


def open_bytes(place: Place, start: int = 0) -> pa.NativeFile:
    """The decompressed bytes of a file from `start` on; those before are skipped where they can't be jumped over."""
    codec = codec_of(place.path)
    if codec is None:
        file = place.filesystem.open_input_file(place.path)
        file.seek(start)
        return file
    stream = place.filesystem.open_input_stream(place.path, compression=codec)
    while start > 0:
        start -= len(stream.read(min(start, _CHUNK_BYTES))) or start
    return stream


def text_start(place: Place) -> int:
    """Where text begins: behind a UTF-8 byte order mark. UserError for UTF-16."""
    with open_bytes(place) as file:
        head = file.read(3)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"input {place.name}: is UTF-16; convert it to UTF-8 first")
    return 3 if head == _BYTE_ORDER_MARK else 0


def read_lines(
    file: pa.NativeFile, start: int, *, blank: bool = False, max_line_bytes: int = MAX_RECORD_BYTES
) -> Iterator[tuple[int, bytes | None]]:
    """(byte offset, line without its end) for each line; None for a line that is too long, which is never held.

    `file` stands at byte `start`. Blank lines are passed over unless asked for. A line is allowed a chunk at least.
    """
    offset = start
    pending: list[bytes] = []  # the pieces of a line that began in an earlier chunk, while it is not too long
    pending_bytes = 0
    while chunk := file.read(_CHUNK_BYTES):
        pieces = chunk.split(b"\n")
        pending_bytes += len(pieces[0])
        if pending_bytes <= max_line_bytes:
            pending.append(pieces[0])
        else:
            pending.clear()
        if len(pieces) == 1:
            continue
        line = b"".join(pending) if pending_bytes <= max_line_bytes else None
        if blank or line is None or not (line.isspace() or not line):
            yield offset, line
        offset += pending_bytes + 1
        for line in pieces[1:-1]:
            if blank or not (line.isspace() or not line):
                yield offset, line
            offset += len(line) + 1
        pending, pending_bytes = [pieces[-1]], len(pieces[-1])
    if pending_bytes:
        line = b"".join(pending) if pending_bytes <= max_line_bytes else None
        if blank or line is None or not line.isspace():
            yield offset, line


def mark_lines(file: pa.NativeFile, start: int, max_marks: int) -> Marks:
    """Count the lines that are not blank and mark where they begin, at about the speed of memory."""
    marks = Marks(max_marks)
    base = line_start = start  # the chunk's first byte, the unfinished line's first byte
    line_blank = True
    while chunk := file.read(_CHUNK_BYTES):
        data = np.frombuffer(chunk, dtype=np.uint8)
        ends = np.flatnonzero(data == _NEWLINE)
        begins = np.concatenate(([0], ends + 1))  # of each line in the chunk, the unfinished last one included
        # A line that begins with a blank byte, or is empty, may be blank: these few are looked at one by one.
        doubtful = np.isin(data[np.minimum(begins, len(data) - 1)], _BLANK_BYTES) | (begins == len(data))
        blank = np.zeros(len(begins), dtype=bool)
        for index in np.flatnonzero(doubtful):
            end = ends[index] if index < len(ends) else len(data)
            piece = chunk[begins[index] : end]
            blank[index] = not piece or piece.isspace()
        offsets = begins + base
        offsets[0] = line_start
        blank[0] &= line_blank
        marks.add(offsets[:-1][~blank[:-1]])
        line_start, line_blank = int(offsets[-1]), bool(blank[-1])
        base += len(data)
    if not line_blank:
        marks.add(np.array([line_start]))
    return marks
