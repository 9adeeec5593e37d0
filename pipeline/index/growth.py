"""Another job's committed parts, added to an index as shards of their own: nothing that is there is built again.

New vectors are numbered after those that are there. They lose the index's own mean, which was that of its first job and
stays; kinds that are trained use what the first shard was trained on. So a vector's place among others does not depend
on when it came, and an addition may be as small as one row.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.commits import Commit
from pipeline.errors import JobError, UserError
from pipeline.index import faiss_files
from pipeline.index.budget import BuildBudget, build_budget
from pipeline.index.build import shares
from pipeline.index.builders import Builders, ThreadBuilders
from pipeline.index.centering import Centering
from pipeline.index.deletions import is_all_deleted, read_deleted
from pipeline.index.kinds import DEFAULT_MEMORY_BYTES, FLAT
from pipeline.index.manifest import ROWS_NAME, IndexedJob, IndexManifest, Provenance
from pipeline.index.recall import Queries, query_numbers
from pipeline.index.row_map import RowMapWriter
from pipeline.index.search import read_centering
from pipeline.index.shard_build import TEMPLATE_NAME, ShardTask, measured, read_rows, write_queries
from pipeline.index.vectors import VectorRun, committed_vectors, dimension_of
from pipeline.job_folder import JobFolder


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """A job whose parts are to be added."""

    folder: JobFolder
    path: str  # of its directory, seen from the one that index/ is in
    job: str
    commits: Mapping[int, Commit]
    provenance: Provenance

    @property
    def source(self) -> IndexedJob:
        return IndexedJob.of(self.job, self.commits, path=self.path)


def add_job(
    draft: Path,
    manifest: IndexManifest,
    added: Addition,
    *,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    threads: int | None = None,
    builders: Builders | None = None,
) -> IndexManifest:
    """A change of `versions.change_index`. Its rows are called by the job's name, or NAME-2 where that is taken.

    New shards are cut and built within `memory_bytes` as `build_index` does it, by `builders` or in this process.
    UserError where its vectors can't be compared with those that are there, it has none, or it is in the index already;
    JobError where the index's recall would be missed.
    """
    source = added.source
    _refuse(draft, manifest, added, source)
    source = dataclasses.replace(source, job=free_name(source.job, [job.job for job in manifest.jobs]))
    centering = read_centering(draft, manifest)
    budget = build_budget(manifest.kind, source.num_vectors, manifest.dimension, memory_bytes=memory_bytes)
    builders = builders or ThreadBuilders(threads)
    scratch = draft.with_name(f"{draft.name}-shards")
    scratch.mkdir()
    try:
        with faiss_files.faiss_threads(threads):
            if manifest.kind != FLAT:
                _prepare(draft, manifest, added, centering, scratch, budget)
            tasks = _tasks(manifest, added, source.num_vectors, centering, scratch, budget, threads)
            results = builders(tasks, side_by_side=budget.side_by_side)
            results, recall = measured(manifest.kind, tasks, results, manifest.recall.target)
        if recall.reached is not None and recall.reached < recall.target:
            raise JobError(
                f"the vectors of {added.folder.root} are found with a recall of {recall.reached:.3f} in an index of "
                f"kind {manifest.kind} that promises {recall.target:g}; index both jobs as one, by a more exact kind"
            )
        for result in results:
            os.rename(scratch / result.shard.file, draft / result.shard.file)
        new_rows = draft / f"{ROWS_NAME}.new"
        with RowMapWriter.open(new_rows, job=source.job) as rows:
            rows.copy(draft / ROWS_NAME)
            for task in tasks:
                for batch in read_rows(task.rows_path):
                    rows.add(batch)
        os.rename(new_rows, draft / ROWS_NAME)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    known = [one for one in (manifest.recall.reached, recall.reached) if one is not None]
    return dataclasses.replace(
        manifest,
        num_vectors=manifest.num_vectors + source.num_vectors,
        shards=(*manifest.shards, *(result.shard for result in results)),
        rows=dataclasses.replace(rows.contents(), file=ROWS_NAME),
        jobs=(*manifest.jobs, source),
        recall=dataclasses.replace(manifest.recall, reached=min(known, default=None)),
    )


def free_name(name: str, taken: list[str]) -> str:
    """
    >>> free_name("docs", ["docs", "docs-2"])
    'docs-3'
    """
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found


def refuse_twice(out: Path, manifest: IndexManifest, deleted: Any, source: IndexedJob) -> None:
    """UserError where rows of the job are in the index, unless all of them were deleted."""
    for job, first in zip(manifest.jobs, manifest.first_vectors, strict=True):
        if job.fingerprint == source.fingerprint and not is_all_deleted(deleted, first, job.num_vectors):
            changed = "" if job.parts_digest == source.parts_digest else " with other parts than it has now"
            raise UserError(
                f"{out} is in the index already, as {job.job!r}{changed}; to take it anew, first delete its rows: "
                f"gristmill index delete OUT --filter \"job == '{job.job}'\""
            )


def _refuse(draft: Path, manifest: IndexManifest, added: Addition, source: IndexedJob) -> None:
    difference = manifest.provenance.difference(added.provenance)
    if difference is not None:
        raise UserError(
            f"the vectors of {added.folder.root} can't be compared with the index's: they were made with another "
            f"{difference}"
        )
    if not source.num_vectors:
        raise UserError(f"{added.folder.root} holds no embeddings to add")
    dimension = dimension_of(added.folder, added.commits)
    if dimension != manifest.dimension:
        raise UserError(
            f"the vectors of {added.folder.root} are {dimension} wide, and the index's {manifest.dimension}"
        )
    refuse_twice(added.folder.root, manifest, read_deleted(draft, manifest), source)


def _prepare(
    draft: Path,
    manifest: IndexManifest,
    added: Addition,
    centering: Centering | None,
    scratch: Path,
    budget: BuildBudget,
) -> None:
    """What `build_shard` shares: the first shard's training without its vectors, and queries drawn from new ones."""
    faiss_files.write_template(draft, manifest.shards[0], scratch / TEMPLATE_NAME, dimension=manifest.dimension)
    numbers = query_numbers(added.source.num_vectors)
    matrix = np.empty((len(numbers), manifest.dimension), np.float32)
    start = 0
    for batch in committed_vectors(added.folder, added.commits, batch_bytes=budget.batch_bytes):
        low, high = np.searchsorted(numbers, (start, start + len(batch.rows)))
        drawn = batch.matrix[numbers[low:high] - start]
        matrix[low:high] = drawn if centering is None else centering.apply(drawn)
        start += len(batch.rows)
    write_queries(scratch, Queries(numbers=numbers + manifest.num_vectors, matrix=matrix))


def _tasks(
    manifest: IndexManifest,
    added: Addition,
    num_vectors: int,
    centering: Centering | None,
    scratch: Path,
    budget: BuildBudget,
    threads: int | None,
) -> list[ShardTask]:
    tasks, first = list[ShardTask](), 0
    for number, count in enumerate(shares(num_vectors, budget.shards), len(manifest.shards)):
        tasks.append(
            ShardTask(
                runs=(VectorRun.of(added.folder, added.commits, first, count),),
                scratch=str(scratch.absolute()),
                number=number,
                kind=manifest.kind,
                dimension=manifest.dimension,
                first=manifest.num_vectors + first,
                count=count,
                center=None if centering is None else centering.center,
                target=manifest.recall.target,
                batch_bytes=budget.batch_bytes,
                threads=threads,
            )
        )
        first += count
    return tasks
