"""What a committed part holds, held against its commit: every row once, in order, whole, and its vectors searchable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commits import Commit
from pipeline.errors import one_line
from pipeline.records import EmbedField, embedded_fields, part_schema

_BATCH_BYTES = 16 << 20
_NAMED = 5  # how many rows a line names


def part_problems(path: Path, commit: Commit) -> Iterator[str]:
    """A line for everything in the part at `path` that is not as its commit says; none if the part is right.

    Memory: 30 bytes a record, and a batch of vectors at a time.
    """
    try:
        with pq.ParquetFile(path) as file:
            yield from _schema_problems(file.schema_arrow)
            yield from _record_problems(file, commit)
    except (pa.ArrowException, OSError, KeyError) as error:
        yield f"can't be read as a part: {one_line(error)}"


def _schema_problems(schema: pa.Schema) -> Iterator[str]:
    vectors = embedded_fields(schema)
    of: Any = "both" if len(vectors) == 2 else next(iter(vectors.values()), None)
    dimension = schema.field(next(iter(vectors))).type.list_size if vectors else None
    expected = part_schema(embeds=of, dimension=dimension, carried=pa.schema([]))
    own = pa.schema([schema.field(place) for place in range(min(len(expected), len(schema)))])
    if not own.equals(expected):
        yield f"its columns are {', '.join(schema.names)}, not those of a part"


def _record_problems(file: pq.ParquetFile, commit: Commit) -> Iterator[str]:
    vectors = embedded_fields(file.schema_arrow)
    if set(vectors.values()) != set(commit.vectors):
        yield f"it embeds {_listed(vectors.values())}, and its commit says {_listed(commit.vectors)}"
    table = file.read(columns=["row", "sample", "error_code"])
    rows, samples = table["row"].to_numpy(), table["sample"].to_numpy()
    failed = table["error_code"].is_valid().to_numpy()
    if len(rows) != commit.records:
        yield f"it holds {len(rows)} records, and its commit says {commit.records}"
    yield from _order_problems(rows, samples, failed, commit)
    codes = Counter(table["error_code"].drop_null().to_pylist())
    if dict(codes) != dict(commit.error_codes) or codes.total() != commit.errors:
        yield f"it holds the errors {dict(codes)}, and its commit says {dict(commit.error_codes)}"
    for column, field in vectors.items():
        yield from _vector_problems(file, column, field, rows, samples, failed, commit)


def _order_problems(
    rows: npt.NDArray[np.int64], samples: npt.NDArray[np.int32], failed: npt.NDArray[np.bool_], commit: Commit
) -> Iterator[str]:
    """rows, samples, failed: [records]."""
    expected = np.arange(commit.first_row, commit.first_row + commit.rows)
    found, first, counts = np.unique(rows, return_index=True, return_counts=True)
    missing, foreign = np.setdiff1d(expected, found), np.setdiff1d(found, expected)
    if len(missing):
        yield f"{_rows(missing)} missing"
    if len(foreign):
        yield f"{_rows(foreign)} not of this split, which has rows {expected[0]} to {expected[-1]}"
    if (np.diff(rows) < 0).any():
        yield "its rows are not in order"
        return
    wanted = np.where(failed[first], 1, commit.samples)  # records of each row
    if len(more := found[counts > wanted]):
        yield f"{_rows(more)} there more than once"
    if len(fewer := found[counts < wanted]):
        yield f"{_rows(fewer)} without some of the {commit.samples} samples"
    mixed = np.add.reduceat(failed, first) if len(rows) else np.empty(0)
    if len(both := found[(mixed > 0) & (counts > 1)]):
        yield f"{_rows(both)} failed and yet there with several records"
    places = np.arange(len(rows)) - np.repeat(first, counts)  # of each record among its row's
    if len(wrong := np.unique(rows[samples != places])):
        yield f"{_rows(wrong)} with samples that are not numbered from 0"


def _vector_problems(
    file: pq.ParquetFile,
    column: str,
    field: EmbedField,
    rows: npt.NDArray[np.int64],
    samples: npt.NDArray[np.int32],
    failed: npt.NDArray[np.bool_],
    commit: Commit,
) -> Iterator[str]:
    width = file.schema_arrow.field(column).type.list_size
    present, bad = [np.empty(0, bool)], [np.empty(0, np.int64)]
    place = 0
    for batch in file.iter_batches(max(_BATCH_BYTES // (4 * width), 1), columns=[column]):
        array: Any = batch[column]
        valid = array.is_valid().to_numpy(zero_copy_only=False)
        matrix = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        searchable = np.isfinite(matrix).all(axis=1) & matrix.any(axis=1)
        bad.append(rows[place + np.flatnonzero(valid)[~searchable]])
        present.append(valid)
        place += len(valid)
    valid = np.concatenate(present)
    if len(wrong := np.unique(rows[valid == failed])):
        yield f"{_rows(wrong)} with a vector in {column} though failed, or without one though not"
    if len(wrong := np.unique(np.concatenate(bad))):
        yield f"{_rows(wrong)} with NaN, infinities or nothing but zeros in {column}"
    counted = int((valid & (samples == 0)).sum() if field == "prompt" else valid.sum())
    if counted != commit.vectors.get(field, 0):
        yield f"it holds {counted} vectors of the {field}, and its commit says {commit.vectors.get(field, 0)}"


def _rows(rows: npt.NDArray[np.int64]) -> str:
    """'row 7 is', 'rows 7, 9 are', 'rows 1, 2, 3, 4, 5 and 12 more are'."""
    named = ", ".join(map(str, rows[:_NAMED].tolist()))
    if len(rows) == 1:
        return f"row {named} is"
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return f"rows {named}{more} are"


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
