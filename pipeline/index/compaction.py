"""Shards of an index built again from the parts, without the vectors that were deleted; small ones joined.

Numbers stay what they are: a vector has its number for good, rows.parquet its record and deleted.parquet the numbers of
the deleted. What changes is the shards: one that is built again keeps the numbers of what it holds, and its range has
gaps. So whoever noted a number, or reads the shards with FAISS alone, is right after it, too.

The shards of the first job keep their number, which its settings want. Those of all that was added after it become as
few as the budget allows, where there are more. Kinds that are trained keep their training.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import JobError
from pipeline.index import faiss_files
from pipeline.index.budget import build_budget
from pipeline.index.build import shares
from pipeline.index.builders import Builders, ThreadBuilders
from pipeline.index.centering import Centering
from pipeline.index.check import IndexedParts
from pipeline.index.deletions import Numbers, read_deleted
from pipeline.index.kinds import DEFAULT_MEMORY_BYTES, FLAT
from pipeline.index.manifest import IndexManifest, Shard
from pipeline.index.recall import Queries, query_numbers
from pipeline.index.search import read_centering
from pipeline.index.shard_build import TEMPLATE_NAME, ShardTask, measured, write_queries
from pipeline.index.vectors import VectorRun


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers `first` to `first + count - 1` that become one shard. `kept`: the shard that has them and stays."""

    first: int
    count: int
    kept: Shard | None = None


def planned_ranges(manifest: IndexManifest, deleted: Numbers | None, *, memory_bytes: int) -> list[Range]:
    """The shards of a compacted index, in order. Where all are kept there is nothing to compact."""
    gone = np.empty(0, np.int64) if deleted is None else deleted
    of_first = [shard for shard in manifest.shards if shard.first_vector < manifest.jobs[0].num_vectors]
    added = list(manifest.shards[len(of_first) :])
    if added:
        first, end = added[0].first_vector, manifest.num_vectors
        standing = end - first - _count(gone, first, end)
        budget = build_budget(manifest.kind, standing, manifest.dimension, memory_bytes=memory_bytes)
        if len(added) > budget.shards:
            return [*_each(of_first, gone), *_cut(first, end, gone, budget.shards)]
    return _each([*of_first, *added], gone)


def compact(
    draft: Path,
    manifest: IndexManifest,
    parts: Sequence[IndexedParts],
    *,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    threads: int | None = None,
    builders: Builders | None = None,
) -> IndexManifest:
    """A change of `versions.change_index`. `parts` are those of the index's jobs, in their order.

    There is something to compact (see `planned_ranges`). UserError for a budget that is too small, JobError where a
    part fails or the recall that the index promises would be missed.
    """
    deleted = read_deleted(draft, manifest)
    ranges = planned_ranges(manifest, deleted, memory_bytes=memory_bytes)
    again = [number for number, one in enumerate(ranges) if one.kept is None]
    assert again, "nothing to compact"
    centering = read_centering(draft, manifest)
    gone = np.empty(0, np.int64) if deleted is None else deleted
    standing = [ranges[number].count - _count_in(gone, ranges[number]) for number in again]
    budget = build_budget(
        manifest.kind,
        sum(standing),
        manifest.dimension,
        memory_bytes=memory_bytes,
        shards=len(again),
        largest=max(standing),
    )
    scratch = draft.with_name(f"{draft.name}-shards")
    scratch.mkdir()
    try:
        tasks = [
            ShardTask(
                runs=_runs(manifest, parts, ranges[number]),
                scratch=str(scratch.absolute()),
                number=number,
                kind=manifest.kind,
                dimension=manifest.dimension,
                first=ranges[number].first,
                count=ranges[number].count,
                center=None if centering is None else centering.center,
                target=manifest.recall.target,
                batch_bytes=budget.batch_bytes,
                threads=threads,
                deleted=_within(gone, ranges[number]),
            )
            for number in again
        ]
        with faiss_files.faiss_threads(threads):
            if manifest.kind != FLAT:
                faiss_files.write_template(
                    draft, manifest.shards[0], scratch / TEMPLATE_NAME, dimension=manifest.dimension
                )
                write_queries(scratch, _queries(tasks, centering, manifest.dimension))
            builders = builders or ThreadBuilders(threads)
            results = builders(tasks, side_by_side=budget.side_by_side)
            results, recall = measured(manifest.kind, tasks, results, manifest.recall.target)
        if recall.reached is not None and recall.reached < recall.target:
            raise JobError(
                f"compacted, the index would be found with a recall of {recall.reached:.3f}, and promises "
                f"{recall.target:g}; it is left as it is. Built anew by a more exact index.kind it is compact too"
            )
        built = iter(result.shard for result in results)
        shards = _put(draft, scratch, manifest, [one.kept or next(built) for one in ranges])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    known = [recall.reached, manifest.recall.reached if len(again) < len(ranges) else None]
    reached = min((one for one in known if one is not None), default=None)
    return dataclasses.replace(manifest, shards=shards, recall=dataclasses.replace(manifest.recall, reached=reached))


def _each(shards: Sequence[Shard], gone: Numbers) -> list[Range]:
    """A range a shard; those that hold nothing deleted are kept."""
    ranges = []
    for shard in shards:
        one = Range(shard.first_vector, shard.num_vectors)
        holds_deleted = _count_in(gone, one) > shard.absent
        ranges.append(one if holds_deleted else dataclasses.replace(one, kept=shard))
    return ranges


def _cut(first: int, end: int, gone: Numbers, shards: int) -> list[Range]:
    """Numbers `first` to `end - 1` in ranges that hold equal shares of what was not deleted."""
    low, high = np.searchsorted(gone, (first, end))
    standing = np.delete(np.arange(first, end), gone[low:high] - first)
    ends = np.cumsum(shares(len(standing), shards))[:-1]
    bounds = [first, *(int(standing[place]) for place in ends), end]
    return [Range(start, stop - start) for start, stop in itertools.pairwise(bounds)]


def _count(gone: Numbers, first: int, end: int) -> int:
    low, high = np.searchsorted(gone, (first, end))
    return int(high - low)


def _count_in(gone: Numbers, one: Range) -> int:
    return _count(gone, one.first, one.first + one.count)


def _within(gone: Numbers, one: Range) -> Numbers | None:
    low, high = np.searchsorted(gone, (one.first, one.first + one.count))
    return gone[low:high] if low < high else None


def _runs(manifest: IndexManifest, parts: Sequence[IndexedParts], one: Range) -> tuple[VectorRun, ...]:
    """Where the vectors of a range are. A job whose rows were all deleted has nothing to be read of it."""
    runs = []
    for job, first, its in zip(manifest.jobs, manifest.first_vectors, parts, strict=True):
        low, high = max(one.first, first), min(one.first + one.count, first + job.num_vectors)
        if low < high:
            if its.commits is None:
                runs.append(VectorRun(out="", parts=(), skip=0, count=high - low))
            else:
                runs.append(VectorRun.of(its.folder, its.commits, low - first, high - low))
    return tuple(runs)


def _queries(tasks: Sequence[ShardTask], centering: Centering | None, dimension: int) -> Queries:
    """Drawn from what the tasks hold."""
    numbers = np.concatenate([task.numbers() for task in tasks])
    places = query_numbers(len(numbers))
    matrix = np.empty((len(places), dimension), np.float32)
    start = 0
    for batch in _batches(tasks):
        low, high = np.searchsorted(places, (start, start + len(batch)))
        drawn = batch[places[low:high] - start]
        matrix[low:high] = drawn if centering is None else centering.apply(drawn)
        start += len(batch)
    return Queries(numbers=numbers[places], matrix=matrix)


def _batches(tasks: Sequence[ShardTask]) -> Iterator[npt.NDArray[np.float32]]:
    for task in tasks:
        for batch in task.batches():
            yield batch.matrix


def _put(draft: Path, scratch: Path, manifest: IndexManifest, shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """Gives shards the names of their places. New ones lie in `scratch`, those that are kept in `draft`."""
    old = {shard.file for shard in manifest.shards}
    kept = [shard for shard in manifest.shards if shard in shards]
    for shard in kept:
        os.rename(draft / shard.file, scratch / f"kept-{shard.file}")
    for name in old - {shard.file for shard in kept}:
        os.unlink(draft / name)
    placed = []
    for number, shard in enumerate(shards):
        name = f"shard-{number:03d}.faiss"
        os.rename(scratch / (f"kept-{shard.file}" if shard in kept else shard.file), draft / name)
        placed.append(dataclasses.replace(shard, file=name))
    return tuple(placed)
