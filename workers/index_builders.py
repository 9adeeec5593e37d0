"""Shards of an index built side by side as Ray tasks, on whichever of the job's machines have a free processor."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence

from pipeline.errors import JobError, UserError
from pipeline.index.builders import Builders, ThreadBuilders
from pipeline.index.shard_build import ShardResult, ShardTask, build_shard
from workers import devices


class RayBuilders:
    """A shard a task of one processor, in the Ray that is connected. A task whose process dies is done again.

    When one fails, those under way are waited for, so that nobody writes any more: `ray.cancel` of a task that is just
    being handed to a worker ends the whole process that asks for it (Ray 2.60, "Tried to complete task that was not
    pending").
    """

    def __init__(
        self,
        build: Callable[[ShardTask], ShardResult] = build_shard,
        *,
        labels: Mapping[str, str] | None = None,
        num_cpus: int = 1,
    ) -> None:
        """`labels`: rules as of Ray's label selectors, for the nodes that may build. `num_cpus`: set aside for each."""
        self._build = build
        self._labels = dict(labels or {})
        self._num_cpus = num_cpus

    def __call__(self, tasks: Sequence[ShardTask], *, side_by_side: int) -> list[ShardResult]:
        import ray

        build = ray.remote(num_cpus=self._num_cpus, max_retries=3, label_selector=self._labels)(self._build)
        results = dict[int, ShardResult]()
        waiting = [dataclasses.replace(task, threads=1) for task in tasks]
        running = dict[ray.ObjectRef[ShardResult], int]()
        try:
            while waiting or running:
                while waiting and len(running) < side_by_side:
                    task = waiting.pop(0)
                    running[build.remote(task)] = task.number
                for reference in ray.wait(list(running))[0]:
                    results[running.pop(reference)] = ray.get(reference)
        except ray.exceptions.RayError as error:
            if running:
                ray.wait(list(running), num_returns=len(running))
            if not isinstance(error, ray.exceptions.RayTaskError):
                reason = str(error).splitlines()[0]
                raise JobError(
                    f"a process that built a shard of the index was lost again and again: {reason}"
                ) from error
            if isinstance(error.cause, JobError | UserError):
                raise error.cause from None
            raise JobError(f"building a shard of the index failed: {error.cause!r}") from error
        return [results[task.number] for task in tasks]


def builders_at_hand(labels: Mapping[str, str] | None = None, *, processors_are_held: bool = False) -> Builders:
    """The Ray that is connected, or else this process's own threads: no Ray is started for an index alone.

    `processors_are_held`: by the caller's own replicas, which are idle; then tasks don't wait for processors.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return RayBuilders(labels=labels, num_cpus=0 if processors_are_held else 1)
    return ThreadBuilders(devices.num_cpus())
