"""A replica: a gang of shards that together hold one model, in one Ray placement group.

Formed once and never mended: when one of its shards dies or falls silent, the whole gang is released, and another
replica of the next generation takes its place. For now a gang is one shard.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.errors import JobError
from workers.assignment import Assignment, ShardReport
from workers.settings import ShardSettings
from workers.shard import ShardActor

REPORT_S = 0.5  # how long a shard may wait before it reports that there is nothing new
FORMING_S = 180.0  # until a worker process must have come up
LOADING_S = 600.0  # of silence, while a model is loaded: reading weights may hold the interpreter
SILENCE_S = 5.0  # of a shard that runs, until it is taken for stopped or cut off


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one shard needs of its node."""

    num_cpus: int
    num_gpus: int = 0

    def bundle(self) -> dict[str, float]:
        return {"CPU": float(self.num_cpus)} | ({"GPU": float(self.num_gpus)} if self.num_gpus else {})

    def __str__(self) -> str:
        return f"{self.num_cpus} CPUs" + (f" and {self.num_gpus} GPUs" if self.num_gpus else "")


class ReplicaLost(Exception):
    """A shard of the gang died, fell silent or gave up. The message says why, in a line."""


class Replica:
    """Forms at once; Ray places it when it can. Every shard always has one report on its way."""

    def __init__(self, settings: ShardSettings, resources: Resources, *, name: str) -> None:
        self.name = name
        self.began_at = time.monotonic()
        self._resources = resources
        self._group: PlacementGroup = placement_group([resources.bundle()], strategy="PACK")
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_capture_child_tasks=True)
        options: dict[str, Any] = {
            "num_cpus": resources.num_cpus,
            "num_gpus": resources.num_gpus,
            "scheduling_strategy": strategy,
            "concurrency_groups": {"orders": 1, "reports": 1},  # a thread each: orders arrive in order
            "max_restarts": 0,
        }
        actor: Any = ray.remote(**options)(ShardActor)
        self._shards = [actor.remote(settings, name)]
        self._heard_at: list[float | None] = [None]  # None until the first report
        self._phases = ["forming"]
        self._asked = {self._ask(rank): rank for rank in range(len(self._shards))}

    @property
    def reports(self) -> list[Any]:
        """References to wait for: a shard's next report, or the news of its death."""
        return list(self._asked)

    def take(self, reference: Any) -> tuple[int, ShardReport]:
        """The rank and the report behind one of `reports` that is ready, and ask again. ReplicaLost if it died."""
        rank = self._asked.pop(reference)
        try:
            report: ShardReport = ray.get(reference)
        except RayActorError as error:
            raise ReplicaLost(_reason(error)) from None
        except RayError as error:
            raise ReplicaLost(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from None
        self._heard_at[rank] = time.monotonic()
        self._phases[rank] = report.phase
        if report.phase != "stopped":
            self._asked[self._ask(rank)] = rank
        return rank, report

    def check(self, now: float) -> None:
        """ReplicaLost if a shard has been silent for too long, JobError if the gang can't be formed at all."""
        for phase, heard_at in zip(self._phases, self._heard_at, strict=True):
            if heard_at is None:
                if now - self.began_at > FORMING_S:
                    raise JobError(self._why_not_formed())
            elif phase != "stopped" and now - heard_at > (LOADING_S if phase == "loading" else SILENCE_S):
                raise ReplicaLost(f"{self.name} has said nothing for {now - heard_at:.0f} seconds")

    def forgive(self, seconds: float) -> None:
        """The listener itself was away for so long: nobody is blamed for that silence."""
        self.began_at += seconds
        self._heard_at = [None if heard_at is None else heard_at + seconds for heard_at in self._heard_at]

    def grant(self, rank: int, assignments: list[Assignment]) -> None:
        self._shards[rank].grant.options(concurrency_group="orders").remote(assignments)

    def revoke(self, rank: int, index: int, revision: int) -> None:
        self._shards[rank].revoke.options(concurrency_group="orders").remote(index, revision)

    def stop(self) -> None:
        """Ask every shard to stop; each says so in a last report."""
        for shard in self._shards:
            shard.stop.options(concurrency_group="orders").remote()

    @property
    def is_busy(self) -> bool:
        """Whether a shard may still have something to hand over; one that is being loaded has not."""
        return "running" in self._phases

    def release(self) -> None:
        """End what is left of the gang and give its resources back."""
        for shard in self._shards:
            ray.kill(shard)
        remove_placement_group(self._group)

    def _ask(self, rank: int) -> Any:
        return self._shards[rank].report.options(concurrency_group="reports").remote(REPORT_S)

    def _why_not_formed(self) -> str:
        total = cast(dict[str, float], ray.cluster_resources())  # type: ignore[no-untyped-call]
        free = cast(dict[str, float], ray.available_resources())  # type: ignore[no-untyped-call]
        wanted = self._resources.bundle()
        lacking = [name for name, amount in wanted.items() if total.get(name, 0.0) < amount]
        if lacking:
            have = ", ".join(f"{total.get(name, 0.0):g} {name}" for name in wanted)
            return f"a worker needs {self._resources} and the whole cluster has {have}; set cluster.threads lower"
        have = ", ".join(f"{free.get(name, 0.0):g} {name}" for name in wanted)
        return f"no node has had {self._resources} free for {FORMING_S:.0f} seconds (free in all: {have})"


def _reason(error: RayActorError) -> str:
    text = " ".join(str(error).split())
    for mark in ("The actor died because of an error raised in its creation task", "Worker exit detail: ", "reason: "):
        if mark in text:
            text = text[text.index(mark) :]
            break
    return f"a worker process died ({text[:300]})"
