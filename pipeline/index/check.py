"""An index held against the committed parts that it was built from: every vector once, at its number, with its bits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commits import Commit
from pipeline.errors import JobError, one_line
from pipeline.index import faiss_files
from pipeline.index.deletions import read_deleted
from pipeline.index.kinds import FLAT
from pipeline.index.manifest import MANIFEST_NAME, ROWS_NAME, IndexedJob, IndexManifest, Shard, parts_digest
from pipeline.index.row_map import SCHEMA
from pipeline.index.search import flat_matrix, read_centering
from pipeline.index.soundness import held_numbers, refuse_unsound_shard
from pipeline.index.vectors import FIELDS, VectorBatch, committed_vectors
from pipeline.job_folder import JobFolder


@dataclass(frozen=True, slots=True)
class IndexedParts:
    """The parts of one of an index's jobs. `commits` None: all its rows were deleted, and nothing is compared."""

    folder: JobFolder
    commits: Mapping[int, Commit] | None


def is_of_these_parts(job: IndexedJob, commits: Mapping[int, Commit]) -> bool:
    """Whether what the index holds of a job was built from just the parts of `commits`."""
    return job.parts_digest == parts_digest(commits)


def index_problems(
    folder: JobFolder, manifest: IndexManifest, parts: Sequence[IndexedParts], *, parts_are_whole: bool
) -> Iterator[str]:
    """A line for everything about the index that is not right; none if it is.

    `parts` are of its jobs, in their order. Where `parts_are_whole` is false, vectors are counted but not compared.
    Vectors are compared bit by bit in a Flat index; of other kinds, which don't keep them, only numbers are. Memory: a
    shard at a time.
    """
    problems = [*_count_problems(manifest, parts), *_file_problems(folder, manifest)]
    yield from problems
    listed = {MANIFEST_NAME, *(contents.file for contents in manifest.files)}
    for name in sorted(set(os.listdir(folder.index)) - listed):
        yield f"{folder.index / name} is no file of the index"
    if not problems:
        try:
            read_deleted(folder.index, manifest)
            if parts_are_whole:
                yield from _content_problems(folder, manifest, parts)
        except JobError as error:
            yield str(error)


def _file_problems(folder: JobFolder, manifest: IndexManifest) -> Iterator[str]:
    for contents in manifest.files:
        try:
            faiss_files.check_file(folder.index, contents)
        except JobError as error:
            yield str(error)


def _count_problems(manifest: IndexManifest, parts: Sequence[IndexedParts]) -> Iterator[str]:
    for job, one in zip(manifest.jobs, parts, strict=True):
        if one.commits is not None:
            held = sum(sum(commit.vectors.values()) for commit in one.commits.values())
            if held != job.num_vectors:
                yield f"the index holds {job.num_vectors} vectors of {job.job}, and the parts hold {held}"


def _content_problems(folder: JobFolder, manifest: IndexManifest, parts: Sequence[IndexedParts]) -> Iterator[str]:
    rows = _Records(folder)
    shards = _Shards(folder, manifest)
    centering = read_centering(folder.index, manifest)
    for job, number, one in zip(manifest.jobs, manifest.first_vectors, parts, strict=True):
        if one.commits is None:
            rows.skip(job.num_vectors)
            continue
        for batch in committed_vectors(one.folder, one.commits):
            wrong_rows = rows.differing(batch, number, job.job)
            if wrong_rows is not None:
                yield f"{folder.index / ROWS_NAME}: vector {wrong_rows} does not stand for the row that it was made of"
                return
            matrix = batch.matrix if centering is None else centering.apply(batch.matrix)
            wrong_vector = shards.differing(matrix, number)
            if wrong_vector is not None:
                yield f"{folder.index}: vector {wrong_vector} is not the embedding in {one.folder.parts}"
                return
            number += len(batch.rows)
    shards.load_rest()


class _Records:
    """Reads rows.parquet alongside the parts."""

    def __init__(self, folder: JobFolder) -> None:
        self._path = folder.index / ROWS_NAME
        self._batches = self._read()
        self._waiting: list[pa.RecordBatch] = []

    def differing(self, batch: VectorBatch, number: int, job: str) -> int | None:
        """The first of the vectors from `number` on whose record is not as `batch` has it. JobError if unreadable."""
        count = len(batch.rows)
        table = self._take(count)
        numbers = np.arange(number, number + count)
        fields = np.array(FIELDS)[batch.fields]
        if table.num_rows != count or not table.schema.equals(SCHEMA):
            return number + table.num_rows
        equal = (
            (table["vector"].to_numpy() == numbers)
            & (table["row"].to_numpy() == batch.rows)
            & (table["sample"].to_numpy() == batch.samples)
            & (table["field"].to_numpy() == fields)
            & (table["job"].to_numpy() == job)
        )
        return None if equal.all() else int(numbers[~equal][0])

    def skip(self, count: int) -> None:
        self._take(count)

    def _take(self, count: int) -> pa.Table:
        while sum(batch.num_rows for batch in self._waiting) < count:
            batch = next(self._batches, None)
            if batch is None:
                break
            self._waiting.append(batch)
        table = pa.Table.from_batches(self._waiting, None if self._waiting else SCHEMA)
        self._waiting = table.slice(count).to_batches()
        return table.slice(0, count)

    def _read(self) -> Iterator[pa.RecordBatch]:
        try:
            with pq.ParquetFile(self._path) as file:
                yield from file.iter_batches()
        except (pa.ArrowException, OSError) as error:
            raise JobError(f"{self._path} can't be read: {one_line(error)}") from error


class _Shards:
    """Loads the shards one after the other, alongside the parts; each once, and never two at a time."""

    def __init__(self, folder: JobFolder, manifest: IndexManifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._flat = manifest.kind == FLAT
        self._waiting = iter(manifest.shards)
        self._deleted = read_deleted(folder.index, manifest)
        self._loaded: tuple[Shard, Any] | None = None

    def differing(self, matrix: npt.NDArray[np.float32], number: int) -> int | None:
        """The first of the vectors from `number` on that a Flat shard has otherwise than `matrix` [n, d]."""
        while self._flat and len(matrix):
            if self._loaded is None or number >= self._loaded[0].first_vector + self._loaded[0].num_vectors:
                self._load_next()
                continue
            shard, index = self._loaded
            count = min(len(matrix), shard.first_vector + shard.num_vectors - number)
            numbers = held_numbers(index)
            if numbers is None:
                numbers = np.arange(shard.first_vector, shard.first_vector + shard.num_held)
            low, high = np.searchsorted(numbers, (number, number + count))
            held = flat_matrix(index)[low:high] if shard.num_held else np.empty((0, matrix.shape[1]), np.float32)
            wanted = np.ascontiguousarray(matrix[numbers[low:high] - number])
            unequal = (held.view(np.uint32) != wanted.view(np.uint32)).any(axis=1)
            if unequal.any():
                return int(numbers[low + np.argmax(unequal)])
            matrix, number = matrix[count:], number + count
        return None

    def load_rest(self) -> None:
        """Loads those not loaded yet: of other kinds than Flat, all. JobError as `_load_next`."""
        while self._load_next():
            pass

    def _load_next(self) -> bool:
        """JobError where the shard's file is damaged or not sound, such as one whose vectors have other numbers."""
        self._loaded = None  # gives the memory of one shard back before that of the next is taken
        shard = next(self._waiting, None)
        if shard is None:
            return False
        index = faiss_files.read_shard(self._folder.index, shard, dimension=self._manifest.dimension)
        path = self._folder.index / shard.file
        refuse_unsound_shard(index, path, shard, exact=self._flat, deleted=self._deleted)
        self._loaded = shard, index
        return True
