"""Committed parts -> an index: vectors are numbered in the order of rows, and each goes into one shard, once.

    parts -> mean (where the job centres) -> sample and queries -> trained, empty index -> shards, side by side
          -> recall of all shards together -> rows.parquet, index.json -> index/

Where a kind misses the recall that is asked, `auto` goes on to the next (see `kinds`); if none is left, what was built
is thrown away. The new index is made under `_attempts/` and takes the place of the old one whole.

Built twice from the same parts, also after a crash, in one process or by many, an index has the same bytes: Flat, SQ
and IVF with any number of threads; HNSW since each shard is built by one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
import numpy.typing as npt

from pipeline.commits import Commit
from pipeline.durable import removed_on_failure, storage_errors
from pipeline.errors import JobError, UserError
from pipeline.index import faiss_files
from pipeline.index.budget import BuildBudget, build_budget
from pipeline.index.builders import Builders, ThreadBuilders
from pipeline.index.centering import CENTER_NAME, Centering
from pipeline.index.effort import effort_name
from pipeline.index.kinds import DEFAULT_MEMORY_BYTES, FLAT, make_index, next_kind, settled_kinds
from pipeline.index.manifest import (
    ROWS_NAME,
    Contents,
    IndexedJob,
    IndexManifest,
    MissedKind,
    Provenance,
    Recall,
    Shard,
    read_manifest,
)
from pipeline.index.recall import Queries, query_numbers
from pipeline.index.row_map import RowMapWriter
from pipeline.index.shard_build import (
    TEMPLATE_NAME,
    ShardResult,
    ShardTask,
    measured,
    read_rows,
    write_queries,
)
from pipeline.index.vectors import VectorRun, committed_vectors, dimension_of
from pipeline.index.versions import Change, new_draft, publish, write_manifest
from pipeline.job_folder import JobFolder

Matrix = npt.NDArray[np.float32]
OnShard = Callable[[str, Shard, tuple[float, ...]], None]

DEFAULT_RECALL: Final = 0.95


def build_index(
    folder: JobFolder,
    commits: Mapping[int, Commit],
    *,
    job: str,
    provenance: Provenance,
    kind: str = FLAT,
    shards: int | None = 1,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    recall: float = DEFAULT_RECALL,
    center: bool = False,
    threads: int | None = None,
    builders: Builders | None = None,
    on_shard: OnShard | None = None,
    change: Change | None = None,
) -> IndexManifest:
    """Builds `index/` from the parts of `commits`, which are published, and puts it in the place of the one there.

    `job` is how rows.parquet calls the job. `kind` is `auto` or a FAISS factory string; `shards` None is as `budget`
    has it. Shards hold equal shares, as far as can be, of consecutive vectors; there are no more of them than vectors.
    `recall` is of the K nearest vectors, and every kind must reach it. With `center` the mean of all vectors is taken
    out of each and kept in center.npy; `provenance` says so too. Shards are built by `builders`, by default side by
    side in this process. `threads`: of FAISS; None for its own choice. `on_shard` hears of every shard that was built:
    its kind, what it became, and the seconds of its trials.

    UserError for a kind that FAISS can't make or train, or that doesn't fit the budget; JobError if a part or the
    storage fails, or no kind reaches the recall. The index that is there stays until the new one is complete, also
    through a crash.
    """
    settings = _Settings(kind=kind, shards=shards, memory_bytes=memory_bytes, recall=recall)
    dimension = dimension_of(folder, commits)
    if dimension is None:
        raise UserError(f"{folder.root} holds no embeddings to index: its job has no `embed`, or nothing is done yet")
    source = IndexedJob.of(job, commits)
    draft = new_draft(folder)
    scratch = draft.with_name(f"{draft.name}-shards")
    builders = builders or ThreadBuilders(threads)
    with (
        removed_on_failure(draft, scratch),
        storage_errors("writing the index in", draft),
        faiss_files.faiss_threads(threads),
    ):
        centering = _centering(folder, commits, dimension) if center else None
        work = _Build(folder, commits, source.num_vectors, dimension, centering, settings, scratch, threads)
        built = work.run(builders, on_shard)
        draft.mkdir()
        for result in built.results:
            os.rename(scratch / result.shard.file, draft / result.shard.file)
        with RowMapWriter.open(draft / ROWS_NAME, job=job) as rows:
            for task in built.tasks:
                for batch in read_rows(task.rows_path):
                    rows.add(batch)
        shutil.rmtree(scratch)
        manifest = IndexManifest(
            kind=built.budget.kind,
            dimension=dimension,
            num_vectors=source.num_vectors,
            provenance=provenance,
            shards=tuple(result.shard for result in built.results),
            rows=rows.contents(),
            jobs=(source,),
            recall=built.recall,
            missed=built.missed,
            center=None if centering is None else centering.write(draft / CENTER_NAME, num_vectors=source.num_vectors),
        )
        if change is not None:
            manifest = change(draft, manifest)
        write_manifest(draft, manifest)
        publish(folder, draft)
    return manifest


def index_is_current(
    folder: JobFolder,
    commits: Mapping[int, Commit],
    *,
    job: str,
    provenance: Provenance,
    kind: str = FLAT,
    shards: int | None = 1,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    recall: float = DEFAULT_RECALL,
    center: bool = False,
) -> bool:
    """Whether `build_index` with these arguments would build what is there, but for what was added or deleted since.

    Of the files it looks at the sizes only.

    A job without rows has nothing to index: then no index is the current one. UserError as `build_index`, for settings.
    """
    if not commits:
        return not folder.index.exists()
    try:
        manifest = read_manifest(folder.index)
    except (UserError, JobError):
        return False
    source = IndexedJob.of(job, commits)
    if manifest.jobs[:1] != (source,):
        return False
    settings = _Settings(kind=kind, shards=shards, memory_bytes=memory_bytes, recall=recall)
    wanted = _wanted(settings, source.num_vectors, manifest.dimension, [one.kind for one in manifest.missed])
    return (
        wanted is not None
        and manifest.kind == wanted.kind
        and _num_shards_of(source.num_vectors, manifest) == wanted.shards
        and manifest.recall.target == settings.recall
        and manifest.provenance == provenance
        and (manifest.center is not None) == center
        and all(_has_size(folder.index, contents) for contents in manifest.files)
    )


def _num_shards_of(num_vectors: int, manifest: IndexManifest) -> int:
    """Shards of the first job, of so many vectors; of none it has one, which compaction may have joined with others."""
    return sum(shard.first_vector < num_vectors for shard in manifest.shards) if num_vectors else 1


def _wanted(settings: _Settings, num_vectors: int, dimension: int, missed: list[str]) -> BuildBudget | None:
    """How to build the kind that is to be tried after those in `missed`; None where none is left."""
    memory_bytes = settings.memory_bytes
    kinds = settled_kinds(settings.kind, num_vectors=num_vectors, dimension=dimension, memory_bytes=memory_bytes)
    kind = next_kind(kinds, missed)
    if kind is None:
        return None
    return build_budget(kind, num_vectors, dimension, memory_bytes=memory_bytes, shards=settings.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    kind: str
    shards: int | None
    memory_bytes: int
    recall: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    budget: BuildBudget
    tasks: list[ShardTask]
    results: list[ShardResult]
    recall: Recall
    missed: tuple[MissedKind, ...]


@dataclass(frozen=True, slots=True)
class _Build:
    """One build, up to shards whose recall is good enough."""

    folder: JobFolder
    commits: Mapping[int, Commit]
    num_vectors: int
    dimension: int
    centering: Centering | None
    settings: _Settings
    scratch: Path
    threads: int | None

    def run(self, builders: Builders, on_shard: OnShard | None) -> _Built:
        missed = list[MissedKind]()
        worst = ""
        while True:
            budget = _wanted(self.settings, self.num_vectors, self.dimension, [one.kind for one in missed])
            if budget is None:
                raise JobError(
                    f"index.recall {self.settings.recall:g} is missed: {worst}; give index.memory_bytes more, name a "
                    "more exact index.kind, or ask less of index.recall. The rows are kept"
                )
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
            template = make_index(budget.kind, self.dimension)
            self._prepare(template, budget)
            tasks = self._tasks(budget)
            results = builders(tasks, side_by_side=budget.side_by_side)
            results, recall = measured(budget.kind, tasks, results, self.settings.recall)
            for result in results:
                if on_shard is not None:
                    on_shard(budget.kind, result.shard, result.seconds)
            if recall.reached is None or recall.reached >= recall.target:
                return _Built(budget=budget, tasks=tasks, results=results, recall=recall, missed=tuple(missed))
            missed.append(MissedKind(kind=budget.kind, reached=recall.reached))
            effort = max(result.shard.effort or 0 for result in results)
            at = f" at {effort_name(template)} {effort}" if effort else ""
            worst = f"{worst}{', ' if worst else ''}{budget.kind} reaches {recall.reached:.3f}{at}"

    def _prepare(self, template: Any, budget: BuildBudget) -> None:
        """Trains `template` and puts it into the scratch folder with the queries; nothing to do for Flat."""
        if budget.kind == FLAT:
            return
        asked = query_numbers(self.num_vectors)
        sample, queries = self._draw(_spread(self.num_vectors, budget.training_vectors, asked), asked, budget)
        if budget.training_vectors:
            faiss_files.train(template, sample, budget.kind)
        write_queries(self.scratch, Queries(numbers=asked, matrix=queries))
        faiss.write_index(template, str(self.scratch / TEMPLATE_NAME))

    def _draw(
        self, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], budget: BuildBudget
    ) -> tuple[Matrix, Matrix]:
        """The vectors of two ascending lists of numbers, in one pass."""
        wanted = (first, second)
        found = tuple(np.empty((len(numbers), self.dimension), np.float32) for numbers in wanted)
        start = 0
        for batch in committed_vectors(self.folder, self.commits, batch_bytes=budget.batch_bytes):
            for numbers, vectors in zip(wanted, found, strict=True):
                low, high = np.searchsorted(numbers, (start, start + len(batch.rows)))
                drawn = batch.matrix[numbers[low:high] - start]
                vectors[low:high] = drawn if self.centering is None else self.centering.apply(drawn)
            start += len(batch.rows)
        return found[0], found[1]

    def _tasks(self, budget: BuildBudget) -> list[ShardTask]:
        tasks, first = list[ShardTask](), 0
        for number, count in enumerate(shares(self.num_vectors, budget.shards)):
            tasks.append(
                ShardTask(
                    runs=(VectorRun.of(self.folder, self.commits, first, count),),
                    scratch=str(self.scratch.absolute()),
                    number=number,
                    kind=budget.kind,
                    dimension=self.dimension,
                    first=first,
                    count=count,
                    center=None if self.centering is None else self.centering.center,
                    target=self.settings.recall,
                    batch_bytes=budget.batch_bytes,
                    threads=self.threads,
                )
            )
            first += count
        return tasks


def _spread(num_vectors: int, count: int, without: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`count` numbers of vectors, or what there is, spread evenly over all but those in `without`. Ascending.

    >>> _spread(8, 3, np.array([0, 4])).tolist()
    [1, 3, 7]
    """
    left = num_vectors - len(without)
    places = np.linspace(0, left - 1, min(count, left)).astype(np.int64)  # apart, since they are at least 1 apart
    return places + np.searchsorted(without - np.arange(len(without)), places, side="right")


def shares(num_vectors: int, shards: int) -> list[int]:
    """Vectors of each shard.

    >>> shares(8, 3)
    [3, 3, 2]
    """
    shards = max(min(shards, num_vectors), 1)
    return [num_vectors // shards + (number < num_vectors % shards) for number in range(shards)]


def _centering(folder: JobFolder, commits: Mapping[int, Commit], dimension: int) -> Centering:
    return Centering.of((batch.matrix for batch in committed_vectors(folder, commits)), dimension)


def _has_size(folder: Path, contents: Contents) -> bool:
    path = folder / contents.file
    return path.is_file() and path.stat().st_size == contents.size_bytes
