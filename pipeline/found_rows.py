"""The records of a job that a search found, with the text that was embedded built again from what they carry."""

from __future__ import annotations

import base64
import bisect
import math
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import JobError, UserError, one_line
from pipeline.job_folder import JobFolder, read_job, read_plan
from pipeline.python_values import UNREADABLE, in_microseconds
from pipeline.records import carried_names
from pipeline.row_text import RowText
from pipeline.schemas import InputSchema

_FEW_ROWS: Final = 32  # of a part, up to which slices of it are made sooner than a copy of its rows


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRow:
    """One record. `passage` is the text that was embedded where not the generation was, or None if it is lost."""

    row: int
    id: str | None
    sample: int
    generation: str | None
    passage: str | None
    columns: dict[str, Any]  # carried, under their names in the input, as JSON values


class FoundRows:
    """Reads single records of a job directory: of each part that holds one, all columns but the vectors.

    Up to `cache_bytes` of what was read stays for the next time. Not to be used by several threads at once.
    """

    def __init__(self, out: Path, *, cache_bytes: int = 0) -> None:
        self._folder = JobFolder(out)
        self._cache_bytes = cache_bytes
        self._parts: OrderedDict[int, _Part] = OrderedDict()  # by split; what was used last comes last
        self._id_columns: OrderedDict[int, tuple[npt.NDArray[np.int64], pa.ChunkedArray[Any]]] = OrderedDict()
        self._form: tuple[pa.Schema, RowText | None] | None = None
        spec = read_job(self._folder)["spec"]
        self._first_rows = [split["first_row"] for split in read_plan(self._folder)["splits"]]
        assert spec["output"]["columns"] != "auto", "columns are settled when a job is planned"
        self.carried = carried_names(spec["output"]["columns"])  # input column -> its column in the parts
        own = spec["embed"]["template"] if spec["embed"] is not None else None
        self._template = own or spec["prompt"]["template"]
        self._column = None if self._template is not None else spec["prompt"]["column"]

    def read(self, wanted: Collection[tuple[int, int]]) -> dict[tuple[int, int], FoundRow]:
        """(row, sample) -> its record. JobError if one is not there, as after damage."""
        by_split: dict[int, list[int]] = defaultdict(list)
        for row, _ in wanted:
            by_split[bisect.bisect_right(self._first_rows, row) - 1].append(row)
        found = {(record.row, record.sample): record for record in self._records(by_split)}
        missing = sorted(set(wanted) - found.keys())
        if missing:
            row, sample = missing[0]
            raise JobError(
                f"{self._folder.root}: row {row}, sample {sample}, is in the index but in no part; run verify"
            )
        return found

    def ids(self, rows: npt.NDArray[np.int64]) -> list[str | None]:
        """The id of each of `rows`, in their order. JobError if a row is not there."""
        splits = np.searchsorted(np.asarray(self._first_rows), rows, side="right") - 1
        found: list[str | None] = [None] * len(rows)
        for split in np.unique(splits).tolist():
            (places,) = np.nonzero(splits == split)
            at, ids = self._ids(split)
            offsets = np.searchsorted(at, rows[places])
            if (offsets == len(at)).any() or (at[offsets] != rows[places]).any():
                raise JobError(f"{self._folder.part(split)} lacks rows that are in the index; run verify")
            for place, id in zip(places.tolist(), _plain_values(ids.take(offsets)), strict=True):
                found[place] = id
        return found

    def _ids(self, split: int) -> tuple[npt.NDArray[np.int64], pa.ChunkedArray[Any]]:
        """The rows of a part, ascending, and the id of each. What was read stays, up to `cache_bytes`."""
        if split in self._id_columns:
            self._id_columns.move_to_end(split)
            return self._id_columns[split]
        table = self._read(split, ["row", "id", "sample"])
        table = table.filter(pc.equal(table["sample"], pa.scalar(0, pa.int32())))
        self._id_columns[split] = found = (table["row"].to_numpy(), table["id"])
        while len(self._id_columns) > 1 and self._id_bytes() > self._cache_bytes:
            self._id_columns.popitem(last=False)
        return found

    def _id_bytes(self) -> int:
        return sum(rows.nbytes + ids.nbytes for rows, ids in self._id_columns.values())

    def _records(self, wanted: Mapping[int, list[int]]) -> list[FoundRow]:
        """All records of the rows of each split; a row that is in no part has none."""
        taken = [batch for split, rows in wanted.items() for batch in self._part(split).records_of(sorted(set(rows)))]
        if not taken:
            return []
        try:
            columns = _columns(pa.Table.from_batches(taken))
        except pa.ArrowException as error:
            raise JobError(f"{self._folder.parts}: its parts differ in their columns; run verify") from error
        passages = self._passages(columns)
        carried = {name: _plain_values(columns[column]) for name, column in self.carried.items()}
        records = zip(
            *(columns[name].to_pylist() for name in ("row", "sample")),
            *(_plain_values(columns[name]) for name in ("id", "text")),
            passages,
            strict=True,
        )
        return [
            FoundRow(
                row=row,
                id=id,
                sample=sample,
                generation=text,
                passage=passage,
                columns={name: values[number] for name, values in carried.items()},
            )
            for number, (row, sample, id, text, passage) in enumerate(records)
        ]

    def _part(self, split: int) -> _Part:
        if split in self._parts:
            self._parts.move_to_end(split)
            return self._parts[split]
        part = _Part(self._read(split, ["row", "id", "sample", "text", *self.carried.values()]))
        self._parts[split] = part
        while self._parts and sum(one.num_bytes for one in self._parts.values()) > self._cache_bytes:
            self._parts.popitem(last=False)
        return part

    def _read(self, split: int, columns: list[str]) -> pa.Table:
        path = self._folder.part(split)
        try:
            return pq.read_table(path, columns=columns, partitioning=None).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise JobError(f"{path}: can't be read ({one_line(error)}); run verify") from error

    def passages(self, table: pa.Table) -> list[str | None]:
        """For records of a part, with its carried columns, the text that was embedded; None where it is lost."""
        return self._passages(_columns(table))

    def _passages(self, columns: Mapping[str, pa.ChunkedArray[Any]]) -> list[str | None]:
        inputs = pa.table({name: columns[column] for name, column in self.carried.items()})
        form = self._row_text(inputs.schema) if inputs.num_columns and inputs.num_rows else None
        if form is None:
            return [None] * len(columns["row"])
        (batch,) = inputs.combine_chunks().to_batches()
        return [text if isinstance(text, str) else None for text in form.texts(batch)]

    def _row_text(self, schema: pa.Schema) -> RowText | None:
        """None where a column that the text is made of is not carried over."""
        if self._form is None or self._form[0] != schema:
            try:
                form = RowText(InputSchema(schema), template=self._template, column=self._column)
            except UserError:
                self._form = (schema, None)
            else:
                self._form = (schema, form)
        return self._form[1]


class _Part:
    """What was read of one part."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        batches = table.to_batches()
        self._batch = batches[0] if len(batches) == 1 else None  # several where one is too small for so long a text
        self._rows = table["row"].to_numpy()  # ascending
        self.num_bytes = table.nbytes

    def records_of(self, rows: Sequence[int]) -> list[pa.RecordBatch]:
        """Those of `rows`, ascending and each once; none of a row that is not there."""
        bounds = self._rows.searchsorted([*rows, *(row + 1 for row in rows)]).tolist()
        runs = zip(bounds[: len(rows)], bounds[len(rows) :], strict=True)
        if self._batch is not None and len(rows) <= _FEW_ROWS:
            return [self._batch.slice(first, end - first) for first, end in runs]
        return self._table.take(np.concatenate([np.arange(*run) for run in runs])).to_batches()


def _columns(table: pa.Table) -> dict[str, pa.ChunkedArray[Any]]:
    """By name, all at once: to ask a table for one by its name takes Arrow longer than to read a few values of it."""
    return dict(zip(table.column_names, table.columns, strict=True))


def _plain_values(column: pa.ChunkedArray[Any]) -> list[Any]:
    """As JSON has them. Text that is not valid UTF-8 is shown with replacement characters; None for what Python can't
    hold, as a date after the year 9999."""
    column = in_microseconds(column)
    try:
        return [_plain(value) for value in column.to_pylist()]
    except UNREADABLE:
        return [_plain_value(value) for value in column]


def _plain_value(value: Any) -> Any:
    try:
        return _plain(value.as_py())
    except UNREADABLE:
        return value.cast(pa.large_binary()).as_py().decode("utf-8", "replace") if _is_text(value.type) else None


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return base64.b64encode(value).decode()
        case list() | tuple():
            return [_plain(item) for item in value]
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case _:
            return value.isoformat() if hasattr(value, "isoformat") else str(value)
