"""A dataset on disk or in a bucket -> deterministic splits -> record batches.

Planning opens a source once: it lists the files, counts their rows and learns where splits begin. What it learnt
travels as JSON; shards open the source from that, and read their splits without looking at anything else.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import pyarrow as pa

from pipeline.cursor_pool import CursorPool
from pipeline.errors import JobError, RowError, UserError, one_line
from pipeline.formats.base import Chunk, Cursor, FileScan, Format, InputFile, Position
from pipeline.formats.plain_text import TEXT_COLUMN
from pipeline.formats.registry import FORMATS
from pipeline.input_files import change_among, change_of, list_files, scan_files
from pipeline.locations import Place, is_uri, locate
from pipeline.schemas import InputSchema, merge_schemas

DEFAULT_BATCH_BYTES = 32 << 20

_CursorKey: TypeAlias = tuple[int, tuple[str, ...], int]  # file, columns, max_bytes


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
    """`rows_per_split: auto`, from the input alone: a power of two, at least 64, that grows with the root of the rows.

    So there are neither too few splits to share out nor more commits than rows are worth.

    >>> [auto_rows_per_split(n) for n in (400, 20_000, 2_000_000, 10**9)]
    [64, 256, 4096, 65536]
    """
    return max(64, 1 << (math.isqrt(num_rows * 9 // 4)).bit_length())


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
        self._cursors = CursorPool()

    @classmethod
    def open(cls, path: str | Sequence[str] | None = None, *, job: str | None = None, format: str = "auto") -> Source:
        """Look at every file of an input once: paths, folders, globs or URIs, or the committed rows of the job `job`.

        UserError for what can't be found or read, or holds no row.
        """
        if (path is None) == (job is None):
            raise UserError("input needs either path or job")
        patterns, job = _whole(path, job)
        form, places = list_files(patterns, job, format)
        looked = scan_files(form, places, job)
        columns = merge_schemas(
            [(file.path, scan.schema) for file, scan in looked if scan.num_rows] or [("", looked[0][1].schema)],
            sparse=form.name == "jsonl",
        )
        source = cls(
            patterns=patterns,
            job=job,
            format=form,
            files=[file for file, _ in looked],
            columns=columns,
            text_column=_text_column(columns, form, is_job=job is not None),
            scans=[scan for _, scan in looked],
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
        key = (split.file, tuple(selected.names), max_bytes)
        cursor = self._cursor(key, split, selected)
        whole = False
        try:
            while row < end:
                chunk = self._chunk(cursor, split, end - row)
                yield Rows(first_row=row, batch=chunk.batch, errors=chunk.errors)
                row += chunk.batch.num_rows
            whole = True
        except GeneratorExit:
            whole = True
            raise
        finally:
            if whole:
                self._cursors.put(key, cursor)
            else:
                cursor.close()

    def means(self, path: str | Sequence[str] | None, job: str | None) -> bool:
        """Whether `open` would look there: relative paths mean other files in another current directory."""
        return (list(self._patterns), self._job) == _whole(path, job)

    def new_files(self) -> list[str]:
        """What the input means by now and did not when the job was planned, by path.

        JobError that names what is gone, or is another than it was then.
        """
        places = self.listed()
        change = change_among(self.files, places)
        if change is not None:
            raise JobError(change)
        known = {file.path for file in self.files}
        return [place.name for place in places if place.name not in known]

    def listed(self) -> list[Place]:
        """The files that the input means by now, whether they are as they were or not. JobError where it means none."""
        try:
            return list_files(self._patterns, self._job, self.format.name)[1]
        except UserError as error:
            raise JobError(f"{error}; the input has changed since the job was planned") from error

    def check_unchanged(self) -> None:
        """JobError that names what is another than when the job was planned: files added, removed or changed."""
        for path in self.new_files():
            raise JobError(f"input {path} has been added since the job was planned")

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
        self._cursors.close()

    def _cursor(self, key: _CursorKey, split: Split, columns: pa.Schema) -> Cursor:
        """A cursor at the split's first row."""
        row = split.first_row - (0 if self.format.one_row_per_file else self._first_rows[split.file])
        cursor = self._cursors.take(key, row, split.start)
        if cursor is not None:
            return cursor
        file = self.files[split.file]
        try:
            change = change_of(file, locate(file.path), thorough=False)
            if change is not None:
                raise JobError(change)
            return self.format.open(self.files, split.file, columns, row=row, start=split.start, max_bytes=key[2])
        except KeyError as error:
            raise self._lacking(split, error) from error
        except (OSError, UserError, pa.ArrowException) as error:
            raise JobError(f"input {file.path}: {one_line(error)}") from error

    def _chunk(self, cursor: Cursor, split: Split, num_rows: int) -> Chunk:
        try:
            return cursor.read(num_rows)
        except KeyError as error:
            raise self._lacking(split, error) from error

    def _lacking(self, split: Split, column: KeyError) -> JobError:
        path = self.files[split.file].path
        return JobError(f"input {path} has changed since the job was planned: it lacks column {column}")


def _whole(path: str | Sequence[str] | None, job: str | None) -> tuple[list[str], str | None]:
    """Patterns and job directory by their whole paths."""
    patterns = [path] if isinstance(path, str) else list(path or [])
    patterns = [pattern if is_uri(pattern) else locate(pattern).name for pattern in patterns]
    return patterns, None if job is None else locate(job).name


def _text_column(schema: InputSchema, format: Format, *, is_job: bool) -> str | None:
    """The column that is read where none is named: `text` of plain text or another job, else the only text there is."""
    texts = schema.text_columns
    if is_job or format.name in ("text", "lines"):
        return TEXT_COLUMN if TEXT_COLUMN in texts else None
    return texts[0] if len(texts) == 1 else None
