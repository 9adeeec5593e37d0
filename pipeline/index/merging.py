"""Indexes of jobs whose vectors can be compared, joined into one: shards side by side, numbered on.

The first one's shards stay as they are; those of the others are read and written once with their new numbers. Nothing
is trained or compared again. What was deleted from one stays deleted.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from pipeline.durable import removed_on_failure, storage_errors, sync_folder
from pipeline.errors import JobError, UserError
from pipeline.index import faiss_files
from pipeline.index.deletions import DELETED_NAME, Numbers, read_deleted, write_deleted
from pipeline.index.flat_file import FlatFile
from pipeline.index.growth import free_name, refuse_twice
from pipeline.index.kinds import FLAT
from pipeline.index.manifest import ROWS_NAME, IndexedJob, IndexManifest, Shard, VersionNote, read_manifest
from pipeline.index.row_map import RowMapWriter
from pipeline.index.search import flat_matrix
from pipeline.index.selection import sparse_numbers
from pipeline.index.versions import clear_drafts, link_or_copy, new_draft, write_manifest
from pipeline.job_folder import JobFolder
from pipeline.lock import lock_existing

_ROWS_AT_ONCE = 1 << 14


def merge_indexes(out: JobFolder, sources: Sequence[JobFolder]) -> IndexManifest:
    """Makes `out`, a folder that is not there or empty, with an index of all that the indexes of `sources` hold.

    UserError where their vectors can't be compared, a job is in two of them, or `out` holds something; JobError where
    one is damaged, another process works in `out`, or the storage fails. Begins again where a source has changed
    meanwhile. Memory: a shard at a time.
    """
    _refuse_full(out)
    _refuse(sources, _manifests(sources))
    with storage_errors("creating", out.attempts):
        out.attempts.mkdir(parents=True, exist_ok=True)
    with lock_existing(out):
        _refuse_full(out)  # another merge may have ended just now
        clear_drafts(out)
        draft = new_draft(out)
        with removed_on_failure(draft), storage_errors("writing the index in", draft):
            while (merged := _merged(out, draft, sources)) is None:
                shutil.rmtree(draft)
            write_manifest(draft, merged)
            os.rename(draft, out.index)
            sync_folder(out.root)
    return merged


def _refuse_full(out: JobFolder) -> None:
    """UserError where `out` is a file, or holds more than a merge that was cut off leaves there."""
    if out.root.exists() and not out.root.is_dir():
        raise UserError(f"{out.root} is a file; name a new folder for the merged index")
    if out.root.exists() and set(out.root.iterdir()) - {out.attempts, out.lock_file}:
        raise UserError(f"{out.root} is not empty; name a new folder for the merged index")


def _manifests(sources: Sequence[JobFolder]) -> list[IndexManifest]:
    return [read_manifest(source.index) for source in sources]


def _merged(out: JobFolder, draft: Path, sources: Sequence[JobFolder]) -> IndexManifest | None:
    """All files but index.json in `draft`, which is made. None where a source changed, so that they may be of both."""
    manifests = _manifests(sources)
    _refuse(sources, manifests)
    draft.mkdir()
    try:
        merged = _Merge(out, draft).run(sources, manifests)
    except JobError:
        if _manifests(sources) == manifests:
            raise
        return None
    return merged if _manifests(sources) == manifests else None


def _refuse(sources: Sequence[JobFolder], manifests: Sequence[IndexManifest]) -> None:
    first = manifests[0]
    for number, (source, manifest) in enumerate(zip(sources, manifests, strict=True)):
        difference = first.provenance.difference(manifest.provenance)
        if difference is not None:
            raise UserError(
                f"{source.root} can't be merged with {sources[0].root}: its vectors were made with another {difference}"
            )
        if manifest.kind != first.kind or manifest.dimension != first.dimension:
            raise UserError(
                f"{source.root} holds {manifest.kind} of {manifest.dimension} and {sources[0].root} {first.kind} of "
                f"{first.dimension}; give both the same index.kind, or add one's rows to the other: gristmill index add"
            )
        if (manifest.center and manifest.center.sha256) != (first.center and first.center.sha256):
            raise UserError(
                f"{source.root} and {sources[0].root} are centred on different means (embed.center), so that their "
                "shards can't be compared; add one's rows to the other instead: gristmill index add"
            )
        for other, other_source in zip(manifests[:number], sources, strict=False):
            deleted = read_deleted(other_source.index, other)
            for job in manifest.jobs:
                refuse_twice(source.root, other, deleted, job)


class _Merge:
    def __init__(self, out: JobFolder, draft: Path) -> None:
        self._out = out
        self._draft = draft
        self._shards: list[Shard] = []
        self._jobs: list[IndexedJob] = []
        self._deleted: list[Numbers] = []
        self._num_vectors = 0

    def run(self, sources: Sequence[JobFolder], manifests: Sequence[IndexManifest]) -> IndexManifest:
        first = manifests[0]
        rows_path = self._draft / ROWS_NAME
        with RowMapWriter.open(rows_path, job="") as rows:
            for source, manifest in zip(sources, manifests, strict=True):
                names = self._add(source, manifest)
                rows.copy(faiss_files.check_file(source.index, manifest.rows), names)
        if first.center is not None:
            link_or_copy(faiss_files.check_file(sources[0].index, first.center), self._draft / first.center.file)
        deleted = np.concatenate(self._deleted) if self._deleted else np.empty(0, np.int64)
        reached = [manifest.recall.reached for manifest in manifests if manifest.recall.reached is not None]
        merged = dataclasses.replace(
            first,
            num_vectors=self._num_vectors,
            shards=tuple(self._shards),
            rows=rows.contents(),
            jobs=tuple(self._jobs),
            recall=dataclasses.replace(
                first.recall,
                target=min(manifest.recall.target for manifest in manifests),  # what all of them promised
                reached=min(reached, default=None),
            ),
            deleted=write_deleted(self._draft / DELETED_NAME, deleted) if len(deleted) else None,
            version=1,
            history=(),
        )
        change = f"merged {', '.join(job.job for job in merged.jobs)}"
        return dataclasses.replace(merged, history=(VersionNote.of(merged, change, datetime.now()),))

    def _add(self, source: JobFolder, manifest: IndexManifest) -> dict[str, str]:
        """Shards, jobs and deletions of one index; gives what its jobs are called in the merged one."""
        offset = self._num_vectors
        names: dict[str, str] = {}
        for job in manifest.jobs:
            names[job.job] = free_name(job.job, [one.job for one in self._jobs])
            seen = os.path.relpath((source.root / job.path).resolve(), self._out.root.resolve())
            self._jobs.append(dataclasses.replace(job, job=names[job.job], path=seen))
        for shard in manifest.shards:
            path = self._draft / f"shard-{len(self._shards):03d}.faiss"
            self._shards.append(_renumbered(source.index, manifest, shard, path, offset))
        deleted = read_deleted(source.index, manifest)
        if deleted is not None:
            self._deleted.append(deleted + offset)
        self._num_vectors += manifest.num_vectors
        return names


def _renumbered(folder: Path, manifest: IndexManifest, shard: Shard, path: Path, offset: int) -> Shard:
    """Writes the shard to `path` with all numbers higher by `offset`."""
    if offset == 0:
        link_or_copy(faiss_files.check_file(folder, shard), path)
        return dataclasses.replace(shard, file=path.name)
    index = faiss_files.read_shard(folder, shard, dimension=manifest.dimension)
    first = shard.first_vector + offset
    if manifest.kind == FLAT:
        matrix = flat_matrix(index) if shard.num_held else np.empty((0, manifest.dimension), np.float32)
        numbers = sparse_numbers(index, shard)
        with FlatFile(
            path,
            dimension=manifest.dimension,
            first_vector=first,
            num_vectors=shard.num_held,
            numbers=None if numbers is None else numbers + offset,
        ) as file:
            for start in range(0, len(matrix), _ROWS_AT_ONCE):
                file.add(matrix[start : start + _ROWS_AT_ONCE])
        contents = file.contents()
    else:
        contents = faiss_files.write_index(_with_first(index, shard, first), path, first_vector=first)
    return dataclasses.replace(
        shard, file=path.name, sha256=contents.sha256, size_bytes=contents.size_bytes, first_vector=first
    )


def _with_first(index: Any, shard: Shard, first: int) -> Any:
    """The same vectors, whose numbers begin at `first`. What it gives may lean on `index`, which is to be kept."""
    outer: Any = faiss.downcast_index(index)
    if isinstance(outer, faiss.IndexIDMap):
        numbers = faiss.vector_to_array(outer.id_map) + (first - shard.first_vector)
        faiss.copy_array_to_vector(numbers, outer.id_map)
        return index
    inner = outer
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    if isinstance(inner, faiss.IndexIVF):  # inverted lists keep numbers themselves
        lists: Any = inner.invlists
        for place in range(lists.nlist):
            size = lists.list_size(place)
            if size:
                faiss.rev_swig_ptr(lists.get_ids(place), size)[:] += first - shard.first_vector
        return index
    wrapped: Any = faiss.IndexIDMap2(faiss.IndexFlatIP(outer.d))  # which takes an empty index alone
    wrapped.index, wrapped.own_fields = outer, False
    wrapped.ntotal = outer.ntotal
    faiss.copy_array_to_vector(np.arange(first, first + shard.num_vectors, dtype=np.int64), wrapped.id_map)
    return wrapped
