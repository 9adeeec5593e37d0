"""A dataset on disk or in a bucket -> deterministic splits -> record batches.

Planning opens a source once: it lists the files, counts their rows and learns where splits begin. What it learnt
travels as JSON; shards open the source from that, and read their splits without looking at anything else.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from pipeline.committed import committed_parts
from pipeline.digests import digest_of
from pipeline.errors import JobError, RowError, UserError
from pipeline.formats.base import Cursor, FileScan, Format, InputFile, Position, ScanLimits
from pipeline.formats.plain_text import TEXT_COLUMN
from pipeline.formats.registry import FORMATS, list_input
from pipeline.locations import Place, is_uri, locate, one_line
from pipeline.schemas import InputSchema, merge_schemas

DEFAULT_BATCH_BYTES = 32 << 20

_HASHED_TOTAL_BYTES = 8 << 30  # a larger input is known by sizes and times: hashing takes a second for each GiB
_TOTAL_MARKS = 1 << 23  # positions remembered in files without an index of their own, 8 bytes each
_TOTAL_SAMPLE_ROWS = 20_000
_NUM_IDLE_CURSORS = 4
_NUM_SCAN_THREADS = 8

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A run of rows of one input file (of text that is a row a file: of several files).

    `first_row` is the job's row number of the first one; `file` counts the source's files; `start` is where the rows
    begin in it, in its format's own terms.
    """

    index: int
    file: int
    first_row: int
    num_rows: int
    start: Position

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Split:
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Consecutive rows of a split. `errors`: offset in the batch -> why that row is unusable.

    What could not be read is null in the batch; other columns of the same row may be whole.
    """

    first_row: int
    batch: pa.RecordBatch
    errors: Mapping[int, RowError]


def auto_rows_per_split(num_rows: int) -> int:
    """`rows_per_split: auto`, from the input alone: some hundred splits of 64 to 4096 rows, larger past 40 million.

    >>> auto_rows_per_split(400), auto_rows_per_split(100_000), auto_rows_per_split(2_000_000)
    (64, 390, 4096)
    """
    return max(64, min(4096, num_rows // 256), num_rows // 10_000)


class Source:
    """The rows of an input. `read` may be called from several threads, each with splits of its own."""

    def __init__(
        self,
        *,
        patterns: Sequence[str],
        job: str | None,
        format: Format,
        files: Sequence[InputFile],
        columns: InputSchema,
        text_column: str | None,
        scans: Sequence[FileScan] | None = None,
    ) -> None:
        self._patterns = tuple(patterns)
        self._job = job
        self.format = format
        self.files = tuple(files)
        self.columns = columns
        self.text_column = text_column  # what is read as the prompt where neither column nor template is named
        self._scans = scans
        self._first_rows = [0, *accumulate(file.num_rows for file in files)]
        self._idle: list[tuple[tuple[int, tuple[str, ...], int], Cursor]] = []
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Sequence[str] | None = None, *, job: str | None = None, format: str = "auto") -> Source:
        """Look at every file of an input once: paths, folders, globs or URIs, or the committed rows of the job `job`.

        UserError for what can't be found or read, or holds no row.
        """
        if (path is None) == (job is None):
            raise UserError("input needs either path or job")
        patterns = [path] if isinstance(path, str) else list(path or [])
        patterns = [pattern if is_uri(pattern) else locate(pattern).name for pattern in patterns]
        job = None if job is None else locate(job).name
        form, places = _listed(patterns, job, format)
        limits = ScanLimits(
            max_marks=min(1 << 17, _TOTAL_MARKS // len(places)),
            sample_rows=max(20, min(2000, _TOTAL_SAMPLE_ROWS // len(places))),
        )
        hashed = all(place.is_local for place in places) and _total_bytes(places) <= _HASHED_TOTAL_BYTES
        looked = _in_threads(lambda place: _look(form, place, limits, hashed), places)
        files = [file for file, _ in looked]
        if job is not None and hashed:
            _refuse_altered_parts(job, files)
        scans = [scan for _, scan in looked]
        columns = merge_schemas(
            [(file.path, scan.schema) for file, scan in looked if scan.num_rows] or [(files[0].path, scans[0].schema)],
            sparse=form.name == "jsonl",
        )
        source = cls(
            patterns=patterns,
            job=job,
            format=form,
            files=files,
            columns=columns,
            text_column=_text_column(columns, form, is_job=job is not None),
            scans=scans,
        )
        if source.num_rows == 0:
            raise UserError(f"input {job or ', '.join(patterns)}: holds no rows")
        if not columns.fields.names:
            raise UserError(f"input {job or ', '.join(patterns)}: no record in it could be read as {form.title}")
        return source

    @property
    def num_rows(self) -> int:
        return self._first_rows[-1]

    @property
    def schema(self) -> pa.Schema:
        """The columns, in few types: every encoding of text is `string`, dictionaries are unpacked."""
        return self.columns.fields

    def splits(self, rows_per_split: int | None = None) -> list[Split]:
        """Runs of at most `rows_per_split` rows (by default auto_rows_per_split), none across two files.

        The same for the same input, always. Only for a source that `open` made.
        """
        assert self._scans is not None, "a source from JSON has its splits beside it"
        step = rows_per_split or auto_rows_per_split(self.num_rows)
        runs: list[tuple[int, int, int, Position]]
        if self.format.one_row_per_file:
            runs = [(first, first, min(step, self.num_rows - first), {}) for first in range(0, self.num_rows, step)]
        else:
            runs = [
                (file, self._first_rows[file] + row, min(step, scan.num_rows - row), scan.locate(row))
                for file, scan in enumerate(self._scans)
                for row in range(0, scan.num_rows, step)
            ]
        return [
            Split(index=index, file=file, first_row=first_row, num_rows=num_rows, start=start)
            for index, (file, first_row, num_rows, start) in enumerate(runs)
        ]

    def read(self, split: Split, columns: Sequence[str], *, max_bytes: int = DEFAULT_BATCH_BYTES) -> Iterator[Rows]:
        """The split's rows, in order, in batches of at most `max_bytes` decoded (a row that is larger comes alone).

        Where no columns are asked for, batches have one that is there, so that they have rows at all. JobError where a
        file can't be read any more or is another than it was at planning.
        """
        selected = self.columns.select(columns or self.columns.usable[:1])
        row, end = split.first_row, split.first_row + split.num_rows
        cursor = self._cursor(split, selected, max_bytes)
        whole = False
        try:
            while row < end:
                chunk = cursor.read(end - row)
                yield Rows(first_row=row, batch=chunk.batch, errors=chunk.errors)
                row += chunk.batch.num_rows
            whole = True
        except GeneratorExit:
            whole = True
            raise
        finally:
            if whole:
                self._put_by((split.file, tuple(selected.names), max_bytes), cursor)
            else:
                cursor.close()

    def check_unchanged(self) -> None:
        """JobError that names what is another than when the job was planned: files added, removed or changed."""
        try:
            _, places = _listed(self._patterns, self._job, self.format.name)
        except UserError as error:
            raise JobError(f"{error}; the input has changed since the job was planned") from error
        found = {place.name: place for place in places}
        planned = {file.path: file for file in self.files}
        for path in planned.keys() - found.keys():
            raise JobError(f"input {path} is gone since the job was planned")
        for path in found.keys() - planned.keys():
            raise JobError(f"input {path} has been added since the job was planned")
        changes = _in_threads(lambda file: _change(file, found[file.path], thorough=True), self.files)
        for change in filter(None, changes):
            raise JobError(change)

    def to_json(self) -> dict[str, Any]:
        """All that a shard needs to read splits, and a later run to see whether the input is still the same."""
        return {
            "patterns": list(self._patterns),
            "job": self._job,
            "format": self.format.name,
            "files": [asdict(file) for file in self.files],
            "schema": base64.b64encode(self.schema.serialize()).decode(),
            "problems": dict(self.columns.problems),
            "text_column": self.text_column,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Source:
        """The source that `to_json` described, without a look at its files. It has no splits of its own."""
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(values["schema"])))
        return cls(
            patterns=values["patterns"],
            job=values["job"],
            format=FORMATS[values["format"]],
            files=[InputFile(**file) for file in values["files"]],
            columns=InputSchema(schema, values["problems"]),
            text_column=values["text_column"],
        )

    def close(self) -> None:
        """Close files that are kept open between splits."""
        with self._lock:
            idle, self._idle = self._idle, []
        for _, cursor in idle:
            cursor.close()

    def _cursor(self, split: Split, columns: pa.Schema, max_bytes: int) -> Cursor:
        """A cursor at the split's first row: one that stands there or shortly before, else a new one."""
        row = split.first_row - (0 if self.format.one_row_per_file else self._first_rows[split.file])
        key = (split.file, tuple(columns.names), max_bytes)
        with self._lock:
            near = [entry for entry in self._idle if entry[0] == key and entry[1].reaches(row, split.start)]
            entry = max(near, key=lambda entry: entry[1].row, default=None)
            if entry is not None:
                self._idle.remove(entry)
        if entry is not None:
            cursor = entry[1]
            cursor.skip(row - cursor.row)
            return cursor
        file = self.files[split.file]
        try:
            place = locate(file.path)
            change = _change(file, place, thorough=False)
            if change is not None:
                raise JobError(change)
            return self.format.open(self.files, split.file, columns, row=row, start=split.start, max_bytes=max_bytes)
        except (OSError, UserError, pa.ArrowException) as error:
            raise JobError(f"input {file.path}: {one_line(error)}") from error

    def _put_by(self, key: tuple[int, tuple[str, ...], int], cursor: Cursor) -> None:
        with self._lock:
            self._idle.append((key, cursor))
            oldest = self._idle.pop(0)[1] if len(self._idle) > _NUM_IDLE_CURSORS else None
        if oldest is not None:
            oldest.close()


def _listed(patterns: Sequence[str], job: str | None, format: str) -> tuple[Format, list[Place]]:
    if job is not None:
        return FORMATS["parquet"], [locate(path) for path in committed_parts(job)]
    return list_input(patterns, format)


def _refuse_altered_parts(job: str, files: Sequence[InputFile]) -> None:
    committed = committed_parts(job)
    for file in files:
        if file.digest != f"sha256:{committed[file.path]}":
            raise UserError(f"input.job {job}: {file.path} is not what was committed; see gristmill verify {job}")


def _look(format: Format, place: Place, limits: ScanLimits, hashed: bool) -> tuple[InputFile, FileScan]:
    scan = format.scan(place.name, limits)
    try:
        digest = digest_of(place, hashed=hashed)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"input {place.name}: {one_line(error)}") from error
    size = int(place.info().size or 0)
    return InputFile(path=place.name, size_bytes=size, num_rows=scan.num_rows, digest=digest), scan


def _change(file: InputFile, place: Place, *, thorough: bool) -> str | None:
    """What is another in a file than at planning, in a line. Its bytes are hashed only where `thorough`."""
    info = place.info()
    if info.type != fs.FileType.File:
        return f"input {file.path} is gone since the job was planned"
    if info.size != file.size_bytes:
        return f"input {file.path} has changed since the job was planned: {file.size_bytes} bytes then, {info.size} now"
    hashed = file.digest.startswith("sha256:")
    if hashed and not thorough:
        return None
    try:
        digest = digest_of(place, hashed=hashed)
    except (OSError, pa.ArrowException) as error:
        return f"input {file.path}: {one_line(error)}"
    if digest == file.digest:
        return None
    what = "its bytes are others (same size)" if hashed else "its time of modification is another"
    return f"input {file.path} has changed since the job was planned: {what}"


def _total_bytes(places: Sequence[Place]) -> int:
    return sum(int(place.info().size or 0) for place in places)


def _text_column(schema: InputSchema, format: Format, *, is_job: bool) -> str | None:
    """The column that is read where none is named: `text` of plain text or another job, else the only text there is."""
    texts = schema.text_columns
    if is_job or format.name in ("text", "lines"):
        return TEXT_COLUMN if TEXT_COLUMN in texts else None
    return texts[0] if len(texts) == 1 else None


def _in_threads(work: Callable[[_In], _Out], items: Sequence[_In]) -> list[_Out]:
    """`work` of each item, in their order; the first exception in that order is raised."""
    if len(items) == 1:
        return [work(items[0])]
    with ThreadPoolExecutor(min(_NUM_SCAN_THREADS, len(items))) as threads:
        return list(threads.map(work, items))
