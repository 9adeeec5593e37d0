"""rows.parquet: what each vector of an index belongs to. Record i is of vector number i."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.durable import HashedFile
from pipeline.errors import JobError, one_line
from pipeline.index.manifest import BUILT_AGAIN, Contents
from pipeline.index.vectors import FIELDS, VectorBatch

_FIELDS: Final[list[pa.Field[Any]]] = [
    pa.field("vector", pa.int64()),
    pa.field("job", pa.string()),
    pa.field("row", pa.int64()),
    pa.field("sample", pa.int32()),
    pa.field("field", pa.string()),
]
SCHEMA: Final = pa.schema(_FIELDS)
_WORDS: Final = pa.dictionary(pa.int32(), pa.string())
_READ_SCHEMA: Final = pa.schema([field.with_type(_WORDS) if field.type == pa.string() else field for field in _FIELDS])
GROUP_ROWS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Place:
    """What a vector belongs to: a row of a job, one of its samples, and what of it was embedded."""

    job: str
    row: int
    sample: int
    field: str  # prompt or generation

    @property
    def record(self) -> tuple[str, int, int]:
        """Which record of which job's parts it is of."""
        return self.job, self.row, self.sample


class RowMapWriter:
    """Writes rows.parquet as vectors come, in row groups of GROUP_ROWS records, so that a number says its group."""

    def __init__(self, path: Path, file: HashedFile, writer: pq.ParquetWriter, *, job: str) -> None:
        self._path = path
        self._file = file
        self._writer = writer
        self._job = job
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self._num_vectors = 0

    @staticmethod
    @contextmanager
    def open(path: Path, *, job: str) -> Iterator[RowMapWriter]:
        """`path` must not exist; it is flushed when the block ends and removed when the block fails."""
        with (
            HashedFile(path) as file,
            pq.ParquetWriter(file.sink, SCHEMA, compression="zstd") as writer,
        ):
            rows = RowMapWriter(path, file, writer, job=job)
            yield rows
            rows._write_groups(at_least=1)

    def add(self, batch: VectorBatch) -> None:
        count = len(batch.rows)
        numbers = pa.array(np.arange(self._num_vectors, self._num_vectors + count))
        fields = pa.array(FIELDS).take(pa.array(batch.fields, pa.int8()))
        jobs = pa.repeat(pa.scalar(self._job, pa.string()), count)
        columns = [numbers, jobs, pa.array(batch.rows), pa.array(batch.samples), fields]
        self._take(pa.table(columns, schema=SCHEMA))

    def _take(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._num_vectors += table.num_rows
        self._num_waiting += table.num_rows
        self._write_groups(at_least=GROUP_ROWS)

    def copy(self, path: Path, names: Mapping[str, str] | None = None) -> None:
        """All records of another rows.parquet, numbered on; `names`: of all its jobs, what they are called here.

        JobError if it can't be read.
        """
        try:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group)
                    numbers = pa.array(np.arange(self._num_vectors, self._num_vectors + table.num_rows))
                    table = table.set_column(0, SCHEMA.field("vector"), numbers)
                    if names is not None:
                        called: Any = table["job"].combine_chunks().dictionary_encode()
                        known = pa.array([names[job] for job in called.dictionary.to_pylist()], pa.string())
                        table = table.set_column(1, SCHEMA.field("job"), known.take(called.indices))
                    self._take(table)
        except (pa.ArrowException, OSError) as error:
            raise JobError(f"{path} can't be read: {one_line(error)}") from error

    def contents(self) -> Contents:
        """To be asked after the block."""
        return Contents(
            file=self._path.name,
            sha256=self._file.sha256,
            size_bytes=self._file.size_bytes,
            first_vector=0,
            num_vectors=self._num_vectors,
        )

    def _write_groups(self, *, at_least: int) -> None:
        while self._num_waiting >= at_least:
            table = pa.concat_tables(self._waiting)
            self._writer.write_table(table.slice(0, GROUP_ROWS), row_group_size=GROUP_ROWS)
            rest = table.slice(GROUP_ROWS)
            self._waiting, self._num_waiting = [rest], rest.num_rows


class RowMap:
    """Finds what vectors belong to. Holds the row groups that were asked for, about 30 bytes a vector in them.

    The file stays open: what takes its name later, when another index is built, is not read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        self._groups: dict[int, _Group] = {}

    def places(self, vectors: Sequence[int] | npt.NDArray[np.int64]) -> list[Place]:
        """One place a vector number, in their order. JobError if the file has none of one, or can't be read."""
        numbers = np.asarray(vectors, np.int64)
        groups = numbers // GROUP_ROWS
        named = set(groups.tolist())
        if len(named) == 1:
            return self._places_in(named.pop(), numbers)
        found: list[Place | None] = [None] * len(numbers)
        for group in sorted(named):
            at = np.flatnonzero(groups == group)
            for i, place in zip(at.tolist(), self._places_in(group, numbers[at]), strict=True):
                found[i] = place
        return [place for place in found if place is not None]

    def _places_in(self, number: int, vectors: npt.NDArray[np.int64]) -> list[Place]:
        try:
            group = self._group(number)
            offsets = vectors - number * GROUP_ROWS
            is_whole = group.is_whole[offsets]
        except (pa.ArrowException, OSError, UnicodeDecodeError, IndexError) as error:
            raise JobError(f"{self._path} can't be read: {one_line(error)}") from error
        if not is_whole.all():
            silent = vectors[~is_whole][0]
            raise JobError(f"{self._path} does not say what vector {silent} belongs to; remove it and {BUILT_AGAIN}")
        return group.places(offsets)

    def table(self, vectors: npt.NDArray[np.int64]) -> pa.Table:
        """The records of these vectors, in their order: SCHEMA."""
        groups = vectors // GROUP_ROWS
        order = np.argsort(groups, kind="stable")
        taken = [SCHEMA.empty_table()]
        for group in np.unique(groups).tolist():
            offsets = vectors[order[groups[order] == group]] - group * GROUP_ROWS
            taken.append(self._group(group).records.take(pa.array(offsets)).cast(SCHEMA))
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return pa.concat_tables(taken).take(back).combine_chunks()

    def _group(self, number: int) -> _Group:
        if number not in self._groups:
            file = pq.ParquetFile(self._file, read_dictionary=["job", "field"])
            if not file.schema_arrow.equals(_READ_SCHEMA):
                raise pa.ArrowInvalid("its columns are not those of a map of rows")
            if not 0 <= number < file.num_row_groups or file.metadata.row_group(number).num_rows > GROUP_ROWS:
                raise IndexError(f"it has no row group {number} of at most {GROUP_ROWS} records")
            self._groups[number] = _Group(file.read_row_group(number).combine_chunks(), number * GROUP_ROWS)
        return self._groups[number]


class _Group:
    """A row group in memory, its columns as arrays too: Arrow takes longer to begin with a few records."""

    def __init__(self, records: pa.Table, first_vector: int) -> None:
        """UnicodeDecodeError where a word is not valid UTF-8."""
        self.records = records
        # Of each record whether it is of the vector that has its place in the file, and lacks nothing.
        self.is_whole = _numbers(records["vector"]) == np.arange(first_vector, first_vector + records.num_rows)
        for column in records.columns:
            if column.null_count:
                self.is_whole &= column.is_valid().to_numpy()
        self._rows, self._samples = _numbers(records["row"]), _numbers(records["sample"])
        self._jobs, self._job_words = _coded(records["job"])
        self._fields, self._field_words = _coded(records["field"])

    def places(self, offsets: npt.NDArray[np.int64]) -> list[Place]:
        """What the records there say, which are whole."""
        return [
            Place(self._job_words[job], row, sample, self._field_words[field])
            for job, row, sample, field in zip(
                *(column[offsets].tolist() for column in (self._jobs, self._rows, self._samples, self._fields)),
                strict=True,
            )
        ]


def _numbers(column: Any) -> npt.NDArray[Any]:
    """As they lie in Arrow's memory where all are there; 0 for those that are not."""
    array: Any = pc.fill_null(column, 0) if column.null_count else column
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks == 1 else array.combine_chunks()
    numbers: npt.NDArray[Any] = array.to_numpy()
    return numbers


def _coded(column: pa.ChunkedArray[Any]) -> tuple[npt.NDArray[Any], list[str]]:
    """A column of words as numbers of words, and the words."""
    array: Any = column.combine_chunks()
    return _numbers(array.indices), array.dictionary.to_pylist()
