"""A replica: a gang of shards that together hold one model, in one Ray placement group.

Formed once and never mended: when one of its shards dies or falls silent, the whole gang is released, and another
replica of the next generation takes its place. It holds a model, and runs jobs on it one after another: who keeps it
when a job is over (`jobs/warm.py`) may give it the next.

A gang of several ranks meets in two steps: when all of them are up and say on which nodes they are, the coordinator,
this process, opens a rendezvous and gives each a seat; then they load their own experts and connect.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.errors import JobError, one_line
from workers.assignment import Assignment, ShardReport
from workers.parallel.seat import Seating
from workers.settings import JobSettings, ShardSettings
from workers.shard import ShardActor

if TYPE_CHECKING:
    from workers.parallel.group import Rendezvous

REPORT_S = 0.5  # how long a shard may wait before it reports that there is nothing new
FORMING_S = 180.0  # until a worker process must have come up
LOADING_S = 120.0  # of silence, while a model is loaded: a tensor that is read may hold the interpreter (see sentry.py)
CAUSE_S = 0.5  # for a death to be known of after it was felt
SILENCE_S = 5.0  # of a shard that runs, until it is taken for stopped or cut off


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one shard needs of its node."""

    num_cpus: int
    num_gpus: int = 0
    memory_bytes: int = 0  # set aside on its node, where a node can't hold several shards

    def bundle(self) -> dict[str, float]:
        wanted = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": self.memory_bytes}
        return {name: float(amount) for name, amount in wanted.items() if amount or name == "CPU"}

    def __str__(self) -> str:
        amounts = [f"{self.num_cpus} {'CPU' if self.num_cpus == 1 else 'CPUs'}"]
        if self.num_gpus:
            amounts.append(f"{self.num_gpus} {'GPU' if self.num_gpus == 1 else 'GPUs'}")
        if self.memory_bytes:
            amounts.append(f"{self.memory_bytes / 2**30:,.1f} GiB of memory")
        return " and ".join(amounts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """On which nodes a gang may be: `labels` are rules as of Ray's label selectors; `apart`: each rank on its own."""

    labels: Mapping[str, str] = field(default_factory=dict)
    apart: bool = False


ANYWHERE = Location()

# Each rank's node -> where the experts of a gang there are to lie.
Place = Callable[[tuple[str, ...]], Seating]


class ReplicaLost(Exception):
    """A shard of the gang died, fell silent or gave up. The message says why, in a line.

    `silent_s`: how long ago that shard was last heard, None if it never was: within this time it happened.
    """

    def __init__(self, reason: str, silent_s: float | None = None) -> None:
        super().__init__(reason)
        self.silent_s = silent_s


class Replica:
    """Forms at once; Ray places it when it can. Every shard always has one report on its way."""

    def __init__(
        self,
        settings: ShardSettings,
        resources: Resources,
        *,
        name: str,
        num_ranks: int = 1,
        place: Place | None = None,
        location: Location = ANYWHERE,
    ) -> None:
        """`name` names the generation, too. `place` is asked once where there are several ranks."""
        assert num_ranks == 1 or place is not None
        self.name = name
        self.began_at = time.monotonic()
        self._resources = resources
        self._num_ranks = num_ranks
        self._place = place
        self._rendezvous: Rendezvous | None = None
        self._turn = 0  # which job it runs
        self.location = location
        self._group: PlacementGroup = placement_group(
            [resources.bundle()] * num_ranks,
            strategy="STRICT_SPREAD" if location.apart else "PACK",
            bundle_label_selector=[dict(location.labels)] * num_ranks if location.labels else None,
        )
        self._shards = [self._start(settings, rank) for rank in range(num_ranks)]
        self._heard_at: list[float | None] = [None] * num_ranks  # None until the first report
        self._phases = ["forming"] * num_ranks
        self._nodes = [""] * num_ranks
        self._gave_up = False  # a shard failed, so the others wait for it in vain
        self._free = [False] * num_ranks
        self._asked = {self._ask(rank): rank for rank in range(len(self._shards))}

    @property
    def reports(self) -> list[Any]:
        """References to wait for: a shard's next report, or the news of its death."""
        return list(self._asked)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Ray's name of each rank's node, empty until it is known."""
        return tuple(self._nodes)

    def take(self, reference: Any) -> tuple[int, ShardReport]:
        """The rank and the report behind one of `reports` that is ready, and ask again. ReplicaLost if it died."""
        rank = self._asked.pop(reference)
        try:
            report: ShardReport = ray.get(reference)
        except RayActorError as error:
            raise ReplicaLost(_reason(error), self._silent_s(rank)) from None
        except RayError as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ReplicaLost(reason, self._silent_s(rank)) from None
        self._heard_at[rank] = time.monotonic()
        self._phases[rank] = report.phase
        self._nodes[rank] = report.node
        self._gave_up = self._gave_up or report.failure is not None
        self._free[rank] = report.phase == "stopped" and report.is_free
        if self._place is not None and all(self._nodes):
            self._give_seats(self._place)
            self._place = None
        if report.phase != "stopped":
            self._asked[self._ask(rank)] = rank
        return rank, report

    def cause(self, told: ReplicaLost) -> ReplicaLost:
        """Why the gang broke, where `told` is what one rank said of its own end.

        A rank's death breaks the others' exchange with it, and they may be heard first.
        """
        if self._num_ranks > 1 and self._asked:
            ready, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=CAUSE_S)
            for reference in ready:
                try:
                    self.take(reference)
                except ReplicaLost as lost:
                    return lost
        return told

    def check(self, now: float, cut_off: Collection[str] = ()) -> None:
        """ReplicaLost if a shard has been silent for too long, or is silent on a node that is `cut_off`.

        One that Ray has not started yet can't be.
        """
        if silent := self.unheard_nodes(now) & set(cut_off):
            rank = self._nodes.index(silent.pop())
            raise ReplicaLost(f"the node of {self._name_of(rank)} can't be reached", self._silent_s(rank))
        for rank, (phase, heard_at) in enumerate(zip(self._phases, self._heard_at, strict=True)):
            if heard_at is None or phase == "stopped":
                continue
            if now - heard_at > (LOADING_S if phase == "loading" else SILENCE_S):
                reason = f"{self._name_of(rank)} has said nothing for {now - heard_at:.0f} seconds"
                raise ReplicaLost(reason, now - heard_at)

    def unheard_nodes(self, now: float) -> set[str]:
        """Nodes of shards that load and have said nothing for a while: each may be cut off, or its shard just busy."""
        return {
            node
            for node, phase, heard_at in zip(self._nodes, self._phases, self._heard_at, strict=True)
            if phase == "loading" and heard_at is not None and now - heard_at > SILENCE_S
        }

    @property
    def is_free(self) -> bool:
        """Whether its job is over and has left every engine as it was, so that `take_up` may follow."""
        return all(self._free)

    def take_up(self, job: JobSettings, name: str) -> None:
        """Run another job with the model that is loaded, under another name. Like a replica that has just formed."""
        assert self.is_free, self.name
        self.name = name
        self.began_at = time.monotonic()
        self._turn += 1
        self._heard_at = [self.began_at] * self._num_ranks
        self._phases = ["forming"] * self._num_ranks
        self._free = [False] * self._num_ranks
        for rank, shard in enumerate(self._shards):
            shard.take_job.options(concurrency_group="orders").remote(job, self._name_of(rank), self._turn)
        self._asked = {self._ask(rank): rank for rank in range(self._num_ranks)}

    @property
    def num_ranks(self) -> int:
        return self._num_ranks

    @property
    def is_forming(self) -> bool:
        """Whether a shard has still to be heard for the first time."""
        return None in self._heard_at

    def places(self) -> list[str]:
        """The node of each rank, as Ray has set room aside for it; [] while there is not room for all."""
        table = cast(dict[str, Any], placement_group_table(self._group))
        return list(table["bundles_to_node_id"].values()) if table["state"] == "CREATED" else []

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
        return "running" in self._phases and not self._gave_up

    def release(self) -> None:
        """End what is left of the gang and give its resources back."""
        for shard in self._shards:
            ray.kill(shard)
        remove_placement_group(self._group)
        if self._rendezvous is not None:
            self._rendezvous.close()

    def _start(self, settings: ShardSettings, rank: int) -> Any:
        options: dict[str, Any] = {
            "num_cpus": self._resources.num_cpus,
            "num_gpus": self._resources.num_gpus,
            "memory": self._resources.memory_bytes,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=rank, placement_group_capture_child_tasks=True
            ),
            "concurrency_groups": {"orders": 1, "reports": 1},  # a thread each: orders arrive in order
            "max_restarts": 0,
        }
        actor: Any = ray.remote(**options)(ShardActor)
        return actor.remote(settings, self._name_of(rank), awaits_seat=self._num_ranks > 1)

    def _name_of(self, rank: int) -> str:
        return f"{self.name}.{rank}" if self._num_ranks > 1 else self.name

    def _give_seats(self, place: Place) -> None:
        """The ranks meet on the loopback where all are on this process's node, else where this node is reached."""
        from workers.parallel.group import Rendezvous  # brings torch, which only gangs need here

        here = ray.get_runtime_context().get_node_id()
        is_local = set(self._nodes) == {here}
        host = "127.0.0.1" if is_local else own_node_address()
        try:
            self._rendezvous = Rendezvous(host)
        except OSError as error:
            raise JobError(f"the ranks of {self.name} can't meet at {host}, this node's address: {error}") from error
        seating = place(tuple(self._nodes))
        seats = self._rendezvous.seats(
            self.name, self._nodes, seating.placement.to_json(), calibrates=seating.calibrates
        )
        for shard, seat in zip(self._shards, seats, strict=True):
            shard.take_seat.options(concurrency_group="orders").remote(seat)

    def _silent_s(self, rank: int) -> float | None:
        heard_at = self._heard_at[rank]
        return None if heard_at is None else time.monotonic() - heard_at

    def _ask(self, rank: int) -> Any:
        return self._shards[rank].report.options(concurrency_group="reports").remote(REPORT_S, self._turn)

    def why_not_formed(self) -> str:
        """For people, once it has taken too long."""
        total = cast(dict[str, float], ray.cluster_resources())  # type: ignore[no-untyped-call]
        free = cast(dict[str, float], ray.available_resources())  # type: ignore[no-untyped-call]
        wanted = self._resources.bundle()
        if any(total.get(name, 0.0) < amount * self._num_ranks for name, amount in wanted.items()):
            have = ", ".join(f"{total.get(name, 0.0):g} {name}" for name in wanted)
            need = f"a worker needs {self._resources}"
            if self._num_ranks > 1:
                need = f"each of a replica's {self._num_ranks} workers needs {self._resources}"
            return f"{need} and the whole cluster has {have}; set cluster.threads lower"
        have = ", ".join(f"{free.get(name, 0.0):g} {name}" for name in wanted)
        waited_s = time.monotonic() - self.began_at
        return f"no node has had {self._resources} free for {waited_s:.0f} seconds (free in all: {have})"


def own_node_address() -> str:
    """Where the other nodes reach this one."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _reason(error: RayActorError) -> str:
    text = " ".join(str(error).split())
    for mark in ("The actor died because of an error raised in its creation task", "Worker exit detail: ", "reason: "):
        if mark in text:
            text = text[text.index(mark) :]
            break
    return f"a worker process died ({text[:300]})"
