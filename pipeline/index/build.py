"""Committed parts -> an index, streaming: vectors are numbered in the order of rows and pass through once.

A Flat shard goes straight to its file; other kinds are held in memory a shard at a time, and trained once on a sample
spread evenly over all vectors. The new index is made under `_attempts/` and takes the place of the old one whole.

Built twice from the same parts, an index has the same bytes where FAISS is deterministic: Flat, SQ and IVF are with any
number of threads; HNSW is only with one, so that it is built with one.
"""

from __future__ import annotations

import dataclasses
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
import numpy.typing as npt

from pipeline.commits import Commit
from pipeline.durable import replace_folder, seal, storage_errors, sync_folder, write_new
from pipeline.errors import JobError, UserError
from pipeline.index import faiss_files
from pipeline.index.centering import CENTER_NAME, Centering
from pipeline.index.effort import is_graph
from pipeline.index.flat_file import FlatFile
from pipeline.index.manifest import (
    MANIFEST_NAME,
    ROWS_NAME,
    Contents,
    IndexedJob,
    IndexManifest,
    Provenance,
    Recall,
    Shard,
    parts_digest,
    read_manifest,
)
from pipeline.index.row_map import RowMapWriter
from pipeline.index.vectors import VectorBatch, committed_vectors, dimension_of
from pipeline.job_folder import JobFolder

Matrix = npt.NDArray[np.float32]

DEFAULT_RECALL: Final = 0.95
_SAMPLE_BYTES: Final = 256 << 20


def build_index(
    folder: JobFolder,
    commits: Mapping[int, Commit],
    *,
    job: str,
    provenance: Provenance,
    kind: str = faiss_files.FLAT,
    shards: int = 1,
    memory_bytes: int | None = None,
    recall: float = DEFAULT_RECALL,
    threads: int | None = None,
    center: bool = False,
) -> IndexManifest:
    """Builds `index/` from the parts of `commits`, which are published, and puts it in the place of the one there.

    `job` is how rows.parquet calls the job; `kind` is `auto` (see `kinds`, which `memory_bytes` is for; None for its
    default) or a FAISS factory string. Shards hold equal shares, as far as can be, of consecutive vectors; there are no
    more of them than vectors. With `center` the mean of all vectors is taken out of each and kept in center.npy;
    `provenance` says so too.

    UserError for a kind that FAISS can't make or train; JobError if a part or the storage fails. The index that is
    there stays until the new one is complete, also through a crash.
    """
    assert shards >= 1
    dimension = dimension_of(folder, commits)
    if dimension is None:
        raise UserError(f"{folder.root} holds no embeddings to index: its job has no `embed`, or nothing is done yet")
    source = _source(commits, job)
    kind = faiss_files.settled_kind(
        kind, num_vectors=source.num_vectors, dimension=dimension, memory_bytes=memory_bytes
    )
    draft = folder.attempts / f"index-{uuid.uuid4().hex}"
    try:
        with storage_errors("writing the index in", draft), faiss_files.faiss_threads(threads):
            template = faiss_files.make_index(kind, dimension)
            centering = _centering(folder, commits, dimension) if center else None
            _train(template, folder, commits, kind, source.num_vectors, centering)
            draft.mkdir()
            contents: list[Shard] = []
            with RowMapWriter.open(draft / ROWS_NAME, job=job) as rows:
                stream = _Stream(committed_vectors(folder, commits), rows, centering)
                first = 0
                for number, count in enumerate(_shares(source.num_vectors, shards)):
                    path = draft / f"shard-{number:03d}.faiss"
                    matrices = stream.take(count)
                    if kind == faiss_files.FLAT:
                        contents.append(_write_flat(path, matrices, dimension, first, count))
                    else:
                        contents.append(_write_shard(path, matrices, template, first))
                    first += count
            manifest = IndexManifest(
                kind=kind,
                dimension=dimension,
                num_vectors=source.num_vectors,
                provenance=provenance,
                shards=tuple(contents),
                rows=rows.contents(),
                jobs=(source,),
                recall=Recall(target=recall, reached=1.0 if kind == faiss_files.FLAT else None, num_queries=0),
                center=None
                if centering is None
                else centering.write(draft / CENTER_NAME, num_vectors=source.num_vectors),
            )
            write_new(draft / MANIFEST_NAME, seal(manifest.to_json()))
            sync_folder(draft)
            replace_folder(draft, folder.index, discarded=folder.attempts / f"index-old-{uuid.uuid4().hex}")
    except Exception:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return manifest


def index_is_current(
    folder: JobFolder,
    commits: Mapping[int, Commit],
    *,
    job: str,
    provenance: Provenance,
    kind: str,
    shards: int,
    memory_bytes: int | None = None,
    recall: float = DEFAULT_RECALL,
    center: bool = False,
) -> bool:
    """Whether `build_index` with these arguments would build what is there. Of the files it looks at the sizes only.

    A job without rows has nothing to index: then no index is the current one.
    """
    if not commits:
        return not folder.index.exists()
    try:
        manifest = read_manifest(folder.index)
    except (UserError, JobError):
        return False
    source = _source(commits, job)
    if manifest.jobs != (source,):
        return False
    wanted = faiss_files.settled_kind(
        kind, num_vectors=source.num_vectors, dimension=manifest.dimension, memory_bytes=memory_bytes
    )
    return (
        manifest.kind == wanted
        and len(manifest.shards) == len(_shares(source.num_vectors, shards))
        and manifest.provenance == provenance
        and manifest.recall.target == recall
        and (manifest.center is not None) == center
        and all(_has_size(folder.index, contents) for contents in manifest.files)
    )


class _Stream:
    """Hands out the vectors in runs of given lengths, and tells rows.parquet of each as it passes."""

    def __init__(self, batches: Iterator[VectorBatch], rows: RowMapWriter, centering: Centering | None) -> None:
        self._batches = batches
        self._centering = centering
        self._rows = rows
        self._rest: Matrix | None = None

    def take(self, count: int) -> Iterator[Matrix]:
        """The next `count` vectors, as matrices [n, d]; parts hold as many as their commits say."""
        while count > 0:
            if self._rest is None or not len(self._rest):
                batch = next(self._batches)
                self._rows.add(batch)
                self._rest = batch.matrix if self._centering is None else self._centering.apply(batch.matrix)
            matrix, self._rest = self._rest[:count], self._rest[count:]
            count -= len(matrix)
            yield matrix


def _shares(num_vectors: int, shards: int) -> list[int]:
    """Vectors of each shard.

    >>> _shares(8, 3)
    [3, 3, 2]
    """
    shards = max(min(shards, num_vectors), 1)
    return [num_vectors // shards + (number < num_vectors % shards) for number in range(shards)]


def _source(commits: Mapping[int, Commit], job: str) -> IndexedJob:
    return IndexedJob(
        job=job,
        fingerprint=next((commit.fingerprint for commit in commits.values()), ""),
        num_parts=len(commits),
        parts_digest=parts_digest(commits),
        num_vectors=sum(sum(commit.vectors.values()) for commit in commits.values()),
    )


def _centering(folder: JobFolder, commits: Mapping[int, Commit], dimension: int) -> Centering:
    return Centering.of((batch.matrix for batch in committed_vectors(folder, commits)), dimension)


def _train(
    index: Any,
    folder: JobFolder,
    commits: Mapping[int, Commit],
    kind: str,
    num_vectors: int,
    centering: Centering | None,
) -> None:
    """Trains on vectors spread evenly over all of them; nothing to do for kinds that need no training."""
    limit = min(num_vectors, _SAMPLE_BYTES // (4 * index.d))
    count = faiss_files.num_training_vectors(index, limit)
    if index.is_trained:
        return
    wanted = np.unique(np.linspace(0, num_vectors - 1, count).astype(np.int64))
    sample: list[Matrix] = [np.empty((0, index.d), np.float32)]
    first = 0
    for batch in committed_vectors(folder, commits):
        low, high = np.searchsorted(wanted, (first, first + len(batch.rows)))
        sample.append(batch.matrix[wanted[low:high] - first])
        first += len(batch.rows)
    vectors = np.concatenate(sample)
    faiss_files.train(index, vectors if centering is None else centering.apply(vectors), kind)


def _write_flat(path: Path, matrices: Iterator[Matrix], dimension: int, first: int, count: int) -> Shard:
    with FlatFile(path, dimension=dimension, first_vector=first, num_vectors=count) as file:
        for matrix in matrices:
            file.add(matrix)
    return Shard(**dataclasses.asdict(file.contents()), recall=1.0)


def _write_shard(path: Path, matrices: Iterator[Matrix], template: Any, first: int) -> Shard:
    index = faiss_files.with_numbers(faiss.clone_index(template), first)
    number = first
    with faiss_files.faiss_threads(1 if is_graph(template) else None):
        for matrix in matrices:
            faiss_files.add_numbered(index, matrix, number)
            number += len(matrix)
    return Shard(**dataclasses.asdict(faiss_files.write_index(index, path, first_vector=first)))


def _has_size(folder: Path, contents: Contents) -> bool:
    path = folder / contents.file
    return path.is_file() and path.stat().st_size == contents.size_bytes
