"""Which vectors of an index belong to rows that a filter means: carried columns -> a mask over vector numbers.

    parts of each job, the columns that the filter names -> (row, sample) that match -> rows.parquet -> mask

Columns are streamed; what is held is a byte a row and a byte a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import JobError, UserError, one_line
from pipeline.index.deletions import is_all_deleted, read_deleted
from pipeline.index.faiss_files import check_file
from pipeline.index.manifest import IndexedJob, IndexManifest
from pipeline.index.selection import Mask
from pipeline.job_folder import JobFolder, read_job, read_plan
from pipeline.records import carried_names
from pipeline.suggest import did_you_mean

OWN_COLUMNS: Final = ("row", "id", "sample", "text")  # of a part; `job` is the name of the job
JOB_COLUMN: Final = "job"

_ID: Final = "\0id"
_ROW: Final = "\0row"  # names that no filter can mean
_SAMPLE: Final = "\0sample"

FolderOf = Callable[[IndexedJob], JobFolder]


class Wanted(Protocol):
    """Says which rows are meant: `expression.Filter`, or anything like it."""

    @property
    def text(self) -> str: ...

    @property
    def columns(self) -> frozenset[str]: ...

    def over(self, schema: pa.Schema) -> pc.Expression: ...


@dataclass(frozen=True, slots=True)
class OfIds:
    """The rows with these ids, as hits say them."""

    ids: Sequence[str]

    @property
    def text(self) -> str:
        return "ids"

    @property
    def columns(self) -> frozenset[str]:
        return frozenset([_ID])

    def over(self, schema: pa.Schema) -> pc.Expression:
        try:
            ids = pa.array(self.ids, pa.string())
        except UnicodeEncodeError as error:
            raise UserError(f"id {error.object!a} is no valid UTF-8, and ids are") from None
        return pc.field(_ID).isin(ids)


def matching_vectors(folder: Path, manifest: IndexManifest, wanted: Wanted, folder_of: FolderOf) -> Mask:
    """[num_vectors]: whether each vector of the index in `folder` (OUT/index) is of a row that `wanted` means.

    Its columns are those that were carried over, by their names in the input; where no input column is called so also
    row, id, sample, text (the generation) and job. A job that does not carry a column has it missing everywhere.
    UserError for a column that no job with rows left has; JobError where parts are gone or damaged, but for what names
    nothing but `job`: it may be asked of a job whose directory is gone.
    """
    mask = np.zeros(manifest.num_vectors, np.bool_)
    deleted = read_deleted(folder, manifest)
    tables = [
        (_table_of(job, folder_of, wanted), first)
        for job, first in zip(manifest.jobs, manifest.first_vectors, strict=True)
        if not is_all_deleted(deleted, first, job.num_vectors)  # or else its directory may be gone
    ]
    if not tables:
        return mask
    known = list(dict.fromkeys(name for table, _ in tables for name in table.names))
    for name in sorted(wanted.columns - {*known, _ID}):
        raise UserError(
            f"--filter {wanted.text!r}: there is no column {name!r}{did_you_mean(name, known)}; "
            f"there are {', '.join(known)} (output.columns says what a job carries over)"
        )
    named = sorted(wanted.columns)
    types: dict[str, pa.DataType] = {}
    for table, _ in tables:
        for name, kind in table.types(named).items():
            types[name] = _common(wanted, name, types.get(name, kind), kind)
    schema = pa.schema([pa.field(name, types.get(name, pa.null())) for name in named])
    with check_file(folder, manifest.rows).open("rb") as file:
        places = pq.ParquetFile(file)
        group_ends = np.cumsum([places.metadata.row_group(n).num_rows for n in range(places.num_row_groups)])
        for table, first in tables:
            end = first + table.num_vectors
            if isinstance(table, _GoneJob):
                mask[first:end] = table.is_meant(wanted, schema)
                continue
            matches = table.matching(wanted, schema)
            for group in range(int(np.searchsorted(group_ends, first, side="right")), places.num_row_groups):
                start = int(group_ends[group]) - places.metadata.row_group(group).num_rows
                if start >= end:
                    break
                low, high = max(start, first), min(int(group_ends[group]), end)
                records = places.read_row_group(group, columns=["row", "sample"]).slice(low - start, high - low)
                mask[low:high] = matches[records["row"].to_numpy(), records["sample"].to_numpy()]
    return mask


def _common(wanted: Wanted, name: str, one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """A type that holds the column of either job. UserError where they can't be compared with the same."""
    if one.equals(other):
        return one
    schemas = [pa.schema([(name, kind)]) for kind in (one, other)]
    try:
        common: pa.DataType = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        raise UserError(
            f"--filter {wanted.text!r}: column {name!r} is of type {one} in one of the index's jobs and of type "
            f"{other} in another"
        ) from None
    return common


def _table_of(job: IndexedJob, folder_of: FolderOf, wanted: Wanted) -> _JobTable | _GoneJob:
    try:
        return _JobTable(job, folder_of(job))
    except JobError:
        if wanted.columns - {JOB_COLUMN}:
            raise
        return _GoneJob(job)


class _GoneJob:
    """A job whose directory is gone or another's by now: its name is all that is known of its rows."""

    def __init__(self, job: IndexedJob) -> None:
        self._name = job.job
        self.num_vectors = job.num_vectors
        self.names = [JOB_COLUMN]

    def types(self, named: Iterable[str]) -> dict[str, pa.DataType]:
        return {JOB_COLUMN: pa.string()}

    def is_meant(self, wanted: Wanted, schema: pa.Schema) -> bool:
        named = pa.table({JOB_COLUMN: [self._name]}).cast(schema)
        return _filtered(named, wanted, wanted.over(schema)).num_rows > 0


class _JobTable:
    """The columns of one job's parts, by the names that a filter knows them under."""

    def __init__(self, job: IndexedJob, folder: JobFolder) -> None:
        self._job = job
        self.num_vectors = job.num_vectors
        self._spec: Any = read_job(folder)["spec"]
        self._num_rows = sum(split["num_rows"] for split in read_plan(folder)["splits"])
        carried = carried_names(self._spec["output"]["columns"])
        self._columns = {**{name: name for name in OWN_COLUMNS}, **carried, _ID: "id"}  # name -> column of the parts
        self._has_own_job = JOB_COLUMN not in self._columns
        self._paths = sorted(folder.parts.glob("*.parquet"))
        self.names = list(dict.fromkeys([*carried, *OWN_COLUMNS, JOB_COLUMN]))

    def types(self, named: Iterable[str]) -> dict[str, pa.DataType]:
        """Of those of the columns that this job has."""
        types: dict[str, pa.DataType] = {JOB_COLUMN: pa.string()} if self._has_own_job else {}
        for path in self._paths[:1]:
            with _reading(path):
                schema = pq.read_schema(path)
            types |= {name: schema.field(self._columns[name]).type for name in named if name in self._columns}
        return types

    def matching(self, wanted: Wanted, schema: pa.Schema) -> npt.NDArray[np.bool_]:
        """[rows of the job, samples a row]. `schema` has the columns that the filter names."""
        generate = self._spec.get("generate")
        matches = np.zeros((self._num_rows, generate["n"] if generate else 1), np.bool_)
        meant = wanted.over(schema)
        needed = [self._columns[name] for name in schema.names if name in self._columns]
        columns = list(dict.fromkeys(["row", "sample", *needed]))
        for path in self._paths:
            with _reading(path), pq.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=columns):
                    found = _filtered(self._table(batch, schema), wanted, meant)
                    matches[found[_ROW].to_numpy(), found[_SAMPLE].to_numpy()] = True
        return matches

    def _table(self, batch: pa.RecordBatch, schema: pa.Schema) -> pa.Table:
        columns: list[Any] = []
        for field in schema:
            if field.name in self._columns:
                column = batch[self._columns[field.name]]
                columns.append(column if column.type.equals(field.type) else column.cast(field.type))
            elif field.name == JOB_COLUMN:
                columns.append(pa.repeat(pa.scalar(self._job.job), batch.num_rows))
            else:
                columns.append(pa.nulls(batch.num_rows, field.type))
        return pa.table([*columns, batch["row"], batch["sample"]], names=[*schema.names, _ROW, _SAMPLE])


def _filtered(table: pa.Table, wanted: Wanted, meant: pc.Expression) -> pa.Table:
    """The rows that are meant. UserError where the values don't let it be said, as where a sum is too large."""
    try:
        return table.filter(meant)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        why = one_line(error)
        raise UserError(f"--filter {wanted.text!r}: can't be told of the rows there are ({why})") from None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise JobError(f"{path} can't be filtered: {one_line(error)}") from error
