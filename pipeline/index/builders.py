"""Who builds the shards of an index: anything that takes tasks and returns their results in the same order."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import faiss

from pipeline.index.shard_build import ShardResult, ShardTask, build_shard


class Builders(Protocol):
    """Builds at most `side_by_side` shards at one time, which is what memory allows. Errors as `build_shard`."""

    def __call__(self, tasks: Sequence[ShardTask], *, side_by_side: int) -> list[ShardResult]: ...


class ThreadBuilders:
    """In this process: a shard a thread, since FAISS does not hold Python up.

    At most `num_threads` of them; None: as many as FAISS would take for one.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        self._num_threads = num_threads or faiss.omp_get_max_threads()

    def __call__(self, tasks: Sequence[ShardTask], *, side_by_side: int) -> list[ShardResult]:
        workers = min(side_by_side, self._num_threads, len(tasks))
        if workers <= 1:
            return [build_shard(task) for task in tasks]
        stopped = threading.Event()
        with ThreadPoolExecutor(workers, "index") as pool:
            waiting = [
                pool.submit(build_shard, dataclasses.replace(task, threads=1), is_stopped=stopped.is_set)
                for task in tasks
            ]
            try:
                return [one.result() for one in waiting]
            except BaseException:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
