"""Parts of a bulk search: for each query its nearest rows, one record each, written batch by batch.

A query that failed, or found nothing, has one record whose `rank` is null, so that no query is ever missing.
q: queries; k: hits a query.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.attempt import Attempt
from pipeline.commits import Commit
from pipeline.durable import HashedFile, storage_errors, sync_folder
from pipeline.errors import JobError, UserError, one_line
from pipeline.index.row_map import RowMap
from pipeline.indexed_jobs import IndexedRows
from pipeline.job_folder import JobFolder, attempt_name

SEARCH_NAME: Final = "search.json"  # what was asked of which index, sealed
QUERIES_NAME: Final = "queries"  # the job directory of the queries

_FIELDS: Final[list[pa.Field[Any]]] = [
    pa.field("query_row", pa.int64(), nullable=False),
    pa.field("query_id", pa.string()),
    pa.field("rank", pa.int32()),
    pa.field("score", pa.float64()),
    pa.field("job", pa.string()),
    pa.field("row", pa.int64()),
    pa.field("id", pa.string()),
    pa.field("sample", pa.int32()),
    pa.field("field", pa.string()),
    pa.field("error_code", pa.string()),
    pa.field("error_message", pa.string()),
]
SCHEMA: Final = pa.schema(_FIELDS)


def digest(document: dict[str, Any]) -> str:
    """Hexadecimal, of what search.json says: the fingerprint of the commits of its answers."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryBatch:
    """Queries that follow each other, as a part of their embeddings holds them."""

    table: pa.Table  # row, id, error_code, error_message
    embedded: npt.NDArray[np.int64]  # places in `table` of those that have a vector
    vectors: npt.NDArray[np.float32]  # [q, d] theirs


def query_batches(folder: JobFolder, commit: Commit, batch_rows: int) -> Iterator[QueryBatch]:
    """The queries of one committed part. JobError if it can't be read."""
    path = folder.part(commit.split)
    try:
        with pq.ParquetFile(path) as file:
            width = file.schema_arrow.field("embedding").type.list_size
            names = ["row", "id", "error_code", "error_message"]
            for batch in file.iter_batches(batch_rows, columns=[*names, "embedding"]):
                vectors: Any = batch["embedding"]
                matrix = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
                embedded = np.flatnonzero(vectors.is_valid().to_numpy(zero_copy_only=False))
                table = pa.Table.from_batches([batch.select(names)])
                yield QueryBatch(table=table, embedded=embedded, vectors=matrix)
    except (pa.ArrowException, OSError) as error:
        raise JobError(f"{path} can't be read: {one_line(error)}") from error


class NeighbourPart:
    """Writes the part of one split of queries under a name of its own in `_attempts/`; `close` flushes it.

    JobError where the storage fails.
    """

    def __init__(self, folder: JobFolder, queries: Commit) -> None:
        self._folder = folder
        self._queries = queries
        self._path = folder.attempts / attempt_name(queries.split, 0)
        self._file = HashedFile(self._path)
        with storage_errors("writing", self._path):
            self._file.__enter__()
            self._writer = pq.ParquetWriter(self._file.sink, SCHEMA, compression="zstd")
        self._records = 0
        self._codes: Counter[str] = Counter()

    def add(self, batch: pa.Table) -> None:
        with storage_errors("writing", self._path):
            self._writer.write_table(batch)
        self._records += batch.num_rows
        self._codes.update(str(code) for code in batch["error_code"].drop_null().to_pylist())

    def close(self) -> Attempt:
        with storage_errors("writing", self._path):
            self._writer.close()
            self._file.__exit__(None, None, None)
            sync_folder(self._path.parent)
        return Attempt(
            split=self._queries.split,
            revision=0,
            path=f"{self._folder.attempts.name}/{self._path.name}",
            sha256=self._file.sha256,
            size_bytes=self._file.size_bytes,
            first_row=self._queries.first_row,
            rows=self._queries.rows,
            records=self._records,
            samples=1,
            errors=self._codes.total(),
            error_codes=dict(sorted(self._codes.items())),
            vectors={},
            prompt_tokens=0,
            completion_tokens=0,
        )


def prepared(batch: QueryBatch, prepare: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]) -> QueryBatch:
    """The batch with its vectors as the index compares them; those that `prepare` refuses become failed queries."""
    try:
        return replace(batch, vectors=prepare(batch.vectors)) if len(batch.vectors) else batch
    except UserError:
        pass
    kept, vectors = [], [batch.vectors[:0]]
    errors: dict[int, str] = {}
    for number, place in enumerate(batch.embedded.tolist()):
        try:
            vectors.append(prepare(batch.vectors[number : number + 1]))
            kept.append(place)
        except UserError as error:
            errors[place] = str(error)
    table = batch.table
    for name, values in (("error_code", dict.fromkeys(errors, "nonfinite")), ("error_message", errors)):
        column = table[name].to_pylist()
        changed = pa.array([values.get(place, value) for place, value in enumerate(column)], pa.string())
        table = table.set_column(table.column_names.index(name), name, changed)
    return QueryBatch(table=table, embedded=np.array(kept, np.int64), vectors=np.concatenate(vectors))


def neighbour_table(
    batch: QueryBatch,
    scores: npt.NDArray[np.float64],
    numbers: npt.NDArray[np.int64],
    rows: RowMap,
    records: IndexedRows,
) -> pa.Table:
    """`scores` and vector `numbers` [q, k] of the queries that have a vector, best first; -1 where there is no more."""
    found = numbers >= 0
    num_hits = np.zeros(batch.table.num_rows, np.int64)
    num_hits[batch.embedded] = found.sum(axis=1)
    num_records = np.maximum(num_hits, 1)
    queries = np.repeat(np.arange(len(num_records)), num_records)  # [records] whose record it is
    firsts = np.cumsum(num_records) - num_records
    ranks = np.arange(len(queries)) - firsts[queries] + 1
    is_hit = num_hits[queries] > 0
    places = rows.table(numbers[found])
    hit_of: Any = pa.array(np.cumsum(is_hit) - 1, mask=~is_hit)  # [records] which of all hits
    ids = pa.array(records.ids(places), pa.string())
    columns: dict[str, Any] = {
        "query_row": batch.table["row"].take(queries),
        "query_id": batch.table["id"].take(queries),
        "rank": pa.array(ranks.astype(np.int32), mask=~is_hit),
        "score": pa.array(scores[found]).take(hit_of),
        **{name: places[name].take(hit_of) for name in ("job", "row")},
        "id": ids.take(hit_of),
        **{name: places[name].take(hit_of) for name in ("sample", "field")},
        **{name: batch.table[name].take(queries) for name in ("error_code", "error_message")},
    }
    return pa.table(columns, schema=SCHEMA)
