"""One shard of an index, built by itself: all it needs is named in a task, so that any process may do it.

    part, part, ... -> vectors `first` to `first + count - 1` -> the shard's file
                                     |                              |
                                     +-> exact search of queries    +-> searched with more and more effort

A shard's bytes depend on its task alone, not on which process builds it, beside which others, or for the how-manieth
time. Memory: the shard, and a few batches; a Flat shard is written as it streams and never held.
"""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.durable import storage_errors
from pipeline.index import faiss_files
from pipeline.index.centering import Centering
from pipeline.index.effort import is_graph
from pipeline.index.flat_file import FlatFile
from pipeline.index.kinds import FLAT
from pipeline.index.manifest import Contents, Recall, Shard
from pipeline.index.recall import KEPT, ExactSearch, Found, K, Queries, Tuned, merged, recall_of, tune
from pipeline.index.search import Numbers
from pipeline.index.vectors import VectorBatch, VectorRun, ahead

Matrix = npt.NDArray[np.float32]

TEMPLATE_NAME: Final = "trained.faiss"
QUERIES_NAME: Final = "queries.npz"

_NOTHING: Final = Found(scores=np.empty((0, 0)), numbers=np.empty((0, 0), np.int64))
_ADD_ROWS: Final = 4096  # added at one time: a graph depends on it, so that it depends on nothing else
_ROWS_SCHEMA: Final = pa.schema([("row", pa.int64()), ("sample", pa.int32()), ("field", pa.int8())])


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """What one shard is built from, and where. Plain data."""

    runs: tuple[VectorRun, ...]  # its `count` vectors, of one job after another
    scratch: str  # folder of what the shards share, which the shard's file and rows are put into
    number: int
    kind: str
    dimension: int
    first: int
    count: int
    center: Matrix | None
    target: float  # recall
    batch_bytes: int
    threads: int | None  # None: as many as FAISS takes by itself
    deleted: Numbers | None = None  # those of its numbers that it is to hold no vector of, ascending

    @property
    def path(self) -> Path:
        return Path(self.scratch) / f"shard-{self.number:03d}.faiss"

    @property
    def rows_path(self) -> Path:
        return Path(self.scratch) / f"rows-{self.number:03d}.arrow"

    def numbers(self) -> Numbers:
        """Of the vectors that it holds."""
        every = np.arange(self.first, self.first + self.count)
        return every if self.deleted is None else np.delete(every, self.deleted - self.first)

    def batches(self) -> Iterator[VectorBatch]:
        """The vectors that it holds, as their parts have them. JobError as `committed_vectors`."""
        end = self.first
        for run in self.runs:
            number, end = end, end + run.count
            for batch in run.batches(self.batch_bytes):
                count = len(batch.rows)
                if self.deleted is not None:
                    low, high = np.searchsorted(self.deleted, (number, number + count))
                    if low < high:
                        kept = np.ones(count, np.bool_)
                        kept[self.deleted[low:high] - number] = False
                        batch = batch.part(kept)
                number += count
                yield batch


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    shard: Shard
    exact: Found  # what there is to find of each query
    found: Found  # what is found with the shard's effort
    seconds: tuple[float, ...]  # of the queries together, for each of the shard's trials


class Stopped(Exception):
    """Somebody said that the shard is not wanted any more."""


def build_shard(task: ShardTask, *, is_stopped: Callable[[], bool] = lambda: False) -> ShardResult:
    """Writes the shard's file and its rows. May be repeated, also by another process after a crash.

    JobError if a part or the storage fails; Stopped soon after `is_stopped` says so.
    """
    centering = None if task.center is None else Centering(task.center)
    draft = task.path.with_suffix(f".{uuid.uuid4().hex}")
    with storage_errors("writing", draft), faiss_files.faiss_threads(task.threads):
        batches = _recorded(task, task.batches())
        vectors = (batch.matrix if centering is None else centering.apply(batch.matrix) for batch in batches)
        matrices = _watched(vectors, is_stopped)
        if task.kind == FLAT:
            result = _build_flat(task, draft, matrices)
        else:
            result = _build_held(task, draft, _cut(matrices))
        os.rename(draft, task.path)
    return result


def harder(task: ShardTask, result: ShardResult) -> ShardResult:
    """The same shard searched with more effort than in `result`; `result` itself where there is no more."""
    shard = result.shard
    if shard.effort is None:
        return result
    index: Any = faiss.read_index(str(task.path))
    with faiss_files.faiss_threads(task.threads):
        tuned = tune(index, read_queries(Path(task.scratch)), result.exact, task.target, more_than=shard.effort)
    if tuned.effort is None or tuned.effort <= shard.effort:
        return result
    return _result(shard, tuned, result.exact, before=result)


def measured(
    kind: str, tasks: list[ShardTask], results: list[ShardResult], target: float
) -> tuple[list[ShardResult], Recall]:
    """What the shards find together. Where that misses though each alone is good enough, all try harder."""
    if kind == FLAT:
        return results, Recall(target=target, reached=1.0, num_queries=0)
    exact = merged([result.exact for result in results], KEPT)
    while True:
        reached, num_queries = recall_of(merged([result.found for result in results], K), exact)
        recall = Recall(target=target, reached=reached, num_queries=num_queries)
        if reached is None or reached >= target:
            return results, recall
        more = [harder(task, result) for task, result in zip(tasks, results, strict=True)]
        if all(new is old for new, old in zip(more, results, strict=True)):
            return results, recall
        results = more


def write_queries(scratch: Path, queries: Queries) -> None:
    np.savez(scratch / QUERIES_NAME, numbers=queries.numbers, matrix=queries.matrix)


def read_queries(scratch: Path) -> Queries:
    with np.load(scratch / QUERIES_NAME) as file:
        return Queries(numbers=file["numbers"], matrix=file["matrix"])


def read_rows(path: Path) -> Iterator[VectorBatch]:
    """What `build_shard` noted of its vectors' rows, without the vectors."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
        for number in range(file.num_record_batches):
            batch = file.get_batch(number)
            rows, samples, fields = (column.to_numpy() for column in batch.columns)
            yield VectorBatch(matrix=np.empty((len(rows), 0), np.float32), rows=rows, samples=samples, fields=fields)


def _recorded(task: ShardTask, batches: Iterator[VectorBatch]) -> Iterator[VectorBatch]:
    with pa.OSFile(str(task.rows_path), "wb") as sink, pa.ipc.new_file(sink, _ROWS_SCHEMA) as file:
        for batch in batches:
            columns = [pa.array(batch.rows), pa.array(batch.samples), pa.array(batch.fields)]
            file.write_batch(pa.record_batch(columns, schema=_ROWS_SCHEMA))
            yield batch


def _watched(matrices: Iterator[Matrix], is_stopped: Callable[[], bool]) -> Iterator[Matrix]:
    for matrix in matrices:
        if is_stopped():
            raise Stopped
        yield matrix


def _build_flat(task: ShardTask, path: Path, matrices: Iterator[Matrix]) -> ShardResult:
    numbers = None if task.deleted is None else task.numbers()
    held = task.count if numbers is None else len(numbers)
    with FlatFile(path, dimension=task.dimension, first_vector=task.first, num_vectors=held, numbers=numbers) as file:
        for matrix in ahead(matrices):
            file.add(matrix)
    return ShardResult(shard=_shard(task, file.contents(), recall=1.0), exact=_NOTHING, found=_NOTHING, seconds=())


def _build_held(task: ShardTask, path: Path, matrices: Iterator[Matrix]) -> ShardResult:
    queries = read_queries(Path(task.scratch))
    template = faiss.read_index(str(Path(task.scratch) / TEMPLATE_NAME))
    index = faiss_files.with_numbers(template, task.first, gaps=task.deleted is not None)
    exact = ExactSearch(queries)
    numbers = task.numbers()
    faiss_files.reserve(index, len(numbers))
    with faiss_files.faiss_threads(1 if is_graph(index) else task.threads):
        for matrix, mine in ahead(_compared(matrices, numbers, exact)):
            faiss_files.add_numbered(index, matrix, mine)
    shard = _shard(task, faiss_files.write_index(index, path, first_vector=task.first))
    if not len(numbers):
        return ShardResult(shard=shard, exact=exact.found, found=exact.found, seconds=())
    return _result(shard, tune(index, queries, exact.found, task.target), exact.found)


def _compared(matrices: Iterator[Matrix], numbers: Numbers, exact: ExactSearch) -> Iterator[tuple[Matrix, Numbers]]:
    """The vectors with the numbers that each has, when `exact` has searched them."""
    place = 0
    for matrix in matrices:
        mine = numbers[place : place + len(matrix)]
        exact.add(matrix, mine)
        yield matrix, mine
        place += len(matrix)


def _shard(task: ShardTask, contents: Contents, *, recall: float | None = None) -> Shard:
    """What the file of a draft is to be called, and the numbers that it stands for."""
    absent = 0 if task.deleted is None else len(task.deleted)
    named = dataclasses.replace(contents, file=task.path.name, num_vectors=task.count)
    return Shard(**dataclasses.asdict(named), recall=recall, absent=absent)


def _result(shard: Shard, tuned: Tuned, exact: Found, *, before: ShardResult | None = None) -> ShardResult:
    seconds = () if before is None else before.seconds
    trials = (*shard.trials, *tuned.trials)
    shard = dataclasses.replace(shard, effort=tuned.effort, recall=tuned.recall, trials=trials)
    return ShardResult(shard=shard, exact=exact, found=tuned.found, seconds=(*seconds, *tuned.seconds))


def _cut(matrices: Iterator[Matrix]) -> Iterator[Matrix]:
    """The same vectors, _ADD_ROWS at a time, wherever parts and batches end."""
    waiting, count = list[Matrix](), 0
    for matrix in matrices:
        while count + len(matrix) >= _ADD_ROWS:
            head, matrix = matrix[: _ADD_ROWS - count], matrix[_ADD_ROWS - count :]
            yield head if not waiting else np.concatenate([*waiting, head])
            waiting, count = [], 0
        if len(matrix):
            waiting.append(matrix)
            count += len(matrix)
    if waiting:
        yield np.concatenate(waiting)
