"""The vectors of committed parts, in the order in which an index numbers them: by row, sample, and prompt first.

d: width of a vector; n: vectors of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commits import Commit
from pipeline.errors import JobError, one_line
from pipeline.job_folder import JobFolder
from pipeline.records import EmbedField, embedded_fields

_Item = TypeVar("_Item")

BATCH_BYTES: Final = 4 << 20
_READ_BYTES: Final = 1 << 20  # of a column at a time, which would be read by whole row groups
FIELDS: Final[tuple[EmbedField, ...]] = ("prompt", "generation")


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorBatch:
    """Vectors that follow each other in the index, and what each belongs to."""

    matrix: npt.NDArray[np.float32]  # [n, d]
    rows: npt.NDArray[np.int64]  # [n]
    samples: npt.NDArray[np.int32]  # [n]
    fields: npt.NDArray[np.int8]  # [n] places in FIELDS

    def part(self, which: Any) -> VectorBatch:
        """Those that a slice, a mask [n] or places choose."""
        return VectorBatch(
            matrix=self.matrix[which], rows=self.rows[which], samples=self.samples[which], fields=self.fields[which]
        )


def dimension_of(folder: JobFolder, commits: Mapping[int, Commit]) -> int | None:
    """d, from the first part's schema; None where the job embeds nothing or nothing is committed."""
    for split in sorted(commits):
        schema = _read_schema(folder, commits[split])
        for column in embedded_fields(schema):
            return cast(int, schema.field(column).type.list_size)
        break
    return None


def committed_vectors(
    folder: JobFolder, commits: Mapping[int, Commit], *, batch_bytes: int = BATCH_BYTES
) -> Iterator[VectorBatch]:
    """All vectors, in batches of about `batch_bytes`. A prompt's vector is given once, with the row's first sample.

    JobError if a part can't be read, or holds another number of vectors than its commit says.
    """
    for split in sorted(commits):
        commit = commits[split]
        found = 0
        for batch in part_vectors(folder, commit, batch_bytes=batch_bytes):
            found += len(batch.rows)
            yield batch
        if found != sum(commit.vectors.values()):
            raise JobError(
                f"{folder.part(split)} holds {found} vectors and its commit says {sum(commit.vectors.values())}; "
                "`gristmill verify` says what is damaged"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorRun:
    """`count` vectors of a job that follow each other, and the parts that hold them. Plain data."""

    out: str  # the job directory
    parts: tuple[Commit, ...]
    skip: int  # vectors of `parts` that come before
    count: int

    @staticmethod
    def of(folder: JobFolder, commits: Mapping[int, Commit], first: int, count: int) -> VectorRun:
        """Those from the job's vector `first` on."""
        parts, skip, number = list[Commit](), 0, 0
        for split in sorted(commits):
            held = sum(commits[split].vectors.values())
            if number < first + count and number + held > first:
                if not parts:
                    skip = first - number
                parts.append(commits[split])
            number += held
        # Another process may read them, which has its own idea of where it is.
        return VectorRun(out=str(folder.root.absolute()), parts=tuple(parts), skip=skip, count=count)

    def batches(self, batch_bytes: int = BATCH_BYTES) -> Iterator[VectorBatch]:
        """JobError as `committed_vectors`."""
        skip, count = self.skip, self.count
        commits = {commit.split: commit for commit in self.parts}
        for batch in committed_vectors(JobFolder(Path(self.out)), commits, batch_bytes=batch_bytes):
            kept = slice(min(skip, len(batch.rows)), min(skip + count, len(batch.rows)))
            skip, count = skip - kept.start, count - (kept.stop - kept.start)
            if kept.stop > kept.start:
                yield batch.part(kept)


def part_vectors(folder: JobFolder, commit: Commit, *, batch_bytes: int = BATCH_BYTES) -> Iterator[VectorBatch]:
    """The vectors of one part. JobError if it can't be read."""
    path = folder.part(commit.split)
    columns = embedded_fields(_read_schema(folder, commit))
    if not columns:
        return
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES) as file:
            width = file.schema_arrow.field(next(iter(columns))).type.list_size
            batch_rows = max(batch_bytes // (4 * width * len(columns)), 1)
            for batch in file.iter_batches(batch_rows, columns=["row", "sample", *columns]):
                yield _vectors_of(batch, columns, width)
    except (pa.ArrowException, OSError) as error:
        raise JobError(f"{path} can't be read: {one_line(error)}") from error


def ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """The same items, each taken in a thread while the one before it is used."""
    end = object()
    with ThreadPoolExecutor(1, "ahead") as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield cast(_Item, item)


def _vectors_of(batch: pa.RecordBatch, columns: Mapping[str, EmbedField], width: int) -> VectorBatch:
    rows, samples = batch["row"].to_numpy(), batch["sample"].to_numpy()
    matrices, places, fields = [], [], []
    for column, field in columns.items():
        array: Any = batch[column]
        present = array.is_valid().to_numpy(zero_copy_only=False)
        matrix = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)  # [records with a vector, d]
        if field == "prompt":
            first = samples == 0
            if not first.all():  # else what Parquet decoded is used where it lies
                matrix = matrix[first[present]]
                present = present & first
        matrices.append(matrix)
        places.append(np.flatnonzero(present))
        fields.append(np.full(len(matrix), FIELDS.index(field), np.int8))
    if len(columns) == 1:
        return VectorBatch(matrix=matrices[0], rows=rows[places[0]], samples=samples[places[0]], fields=fields[0])
    place, field_numbers = np.concatenate(places), np.concatenate(fields)
    order = np.lexsort((field_numbers, place))
    return VectorBatch(
        matrix=np.concatenate(matrices)[order],
        rows=rows[place][order],
        samples=samples[place][order],
        fields=field_numbers[order],
    )


def _read_schema(folder: JobFolder, commit: Commit) -> pa.Schema:
    path = folder.part(commit.split)
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise JobError(f"{path} can't be read: {one_line(error)}") from error
