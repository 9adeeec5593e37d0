"""Every replica of a job: started or taken over, listened to, replaced. What the controller knows of Ray is here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.cluster.head_watch import RayLost
from jobs.cluster.hosts import candidates, hosts, judge, own_location, refuse_wishes_of_nodes, survey
from jobs.cluster.nodes import Node, lost_nodes
from jobs.cluster.recovery import RankNeeds, resized
from jobs.cluster.room import RoomWatch
from jobs.cluster.visibility import refuse_blind_nodes
from jobs.events import Lease, ReplicaDied, ReplicaResized, ShardId
from jobs.experts.calibration_watch import CalibrationWatch
from jobs.experts.placements import (
    MEASURED,
    ExpertLayers,
    gang_name,
    place_experts,
    record_calibration,
    record_kept,
    record_of,
)
from jobs.layout import Layout, Machine, choose_layout
from jobs.ray_session import wait_for
from jobs.spec import ClusterSpec, JsonObject
from jobs.warm import Holding, Kept, WarmReplicas
from pipeline.commits import Commit
from pipeline.errors import JobError
from pipeline.job_folder import JobFolder
from pipeline.source import Split
from workers import devices
from workers.assignment import Assignment, Base, ShardReport
from workers.parallel.seat import Seating
from workers.replica import Replica, ReplicaLost, Resources
from workers.settings import EngineSettings, ShardSettings

if TYPE_CHECKING:
    from workers.forecast import Forecast

STOPPING_S = 15.0  # for a step under way and the parts that are being written
PROBE_S = 2.0  # between two looks at whether a node can be reached
AWAY_S = 1.0  # between two looks at the replicas; if it was longer, the silence may be ours


@dataclass(frozen=True, slots=True)
class Heard:
    shard: ShardId
    report: ShardReport


class Fleet:
    """The living replicas by number, each with its generation. Ray is started for the first of them."""

    def __init__(
        self,
        settings: ShardSettings,
        cluster: ClusterSpec,
        *,
        model: Mapping[str, str],
        warm: WarmReplicas | None = None,
    ) -> None:
        """`model`: names and digests of its files. `warm`: where replicas come from and go to, if they are kept."""
        self._settings = settings
        self._folder = JobFolder(Path(settings.job.out))
        self._cluster = cluster
        self._digest = model
        self._lasting = warm is not None
        self._warm = warm if warm is not None else WarmReplicas(keeps=False)
        self._joins = self._warm.joins(cluster.address)
        self._layout: Layout | None = None
        self._model: Callable[[str], Forecast] | None = None
        self._room: RoomWatch | None = None
        self._news: list[ReplicaResized] = []  # to be told when somebody listens
        self._experts: ExpertLayers | None = None
        self._calibrations = CalibrationWatch()
        self._replicas: dict[int, tuple[int, Replica]] = {}
        self._holdings: dict[int, Holding] = {}  # of each, as it was formed last
        self._looked_at = time.monotonic()
        self._probe_at = 0.0

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lay_out(self, model: Callable[[str], Forecast] | None) -> Layout:
        """Settle how many shards of what size there are to be, as `choose_layout` does, before any is started.

        A Ray that runs already is joined for it. UserError if it lacks what the job asks for.
        """
        cluster, nodes = self._cluster, list[Node]()
        if self._joins:
            self._warm.connect(self._cluster.address, num_cpus=0)
            nodes = candidates(cluster)
        else:
            refuse_wishes_of_nodes(cluster)
        machines = [node.machine for node in nodes] if self._joins else [this_machine()]
        layout = choose_layout(cluster, machines, model=model, gpu_bytes=self._gpu_bytes)
        if self._joins:
            needs = shard_resources(layout)
            layout = judge(nodes, needs, layout, cluster)
            refuse_blind_nodes(hosts(nodes, needs), self._settings)
        self._layout, self._model = layout, model
        self._room = RoomWatch(layout, self._rank_needs, cluster)
        return layout

    def _gpu_bytes(self) -> int | None:
        return devices.cluster_gpu_bytes(self._cluster.labels) if self._joins else devices.gpu_bytes()

    def start(self, replica: int, generation: int) -> None:
        """UserError or JobError if there is no Ray to be had."""
        assert replica not in self._replicas
        layout, room = self._layout, self._room
        assert layout is not None, "lay_out comes first"
        assert room is not None
        # A Ray of our own is told that this machine has its CPUs, or more where the job insists on more threads.
        num_cpus = max(devices.num_cpus(), layout.num_shards * layout.threads)
        self._warm.connect(self._cluster.address, num_cpus=0 if self._joins else num_cpus)
        self._warm.head.ask(partial(self._start, room, layout, replica, generation))

    def _start(self, room: RoomWatch, layout: Layout, replica: int, generation: int) -> None:
        ranks = room.first_size(replica, self._others(replica))
        if ranks < layout.ranks:
            self._news.append(ReplicaResized(replica, generation, ranks, "there is still no room for more"))
        self._form(replica, generation, ranks)

    def _form(self, number: int, generation: int, ranks: int) -> None:
        assert self._layout is not None
        layout = resized(self._layout, ranks, self._forecast() if ranks != self._layout.ranks else None)
        engine = replace(self._settings.engine, threads=layout.threads, device=layout.device, sharers=layout.sharers)
        name = gang_name(number, generation)
        holding = self._holding(engine, layout)
        kept = self._warm.take(holding, suits=self._suits)
        if kept is not None:
            replica = kept.replica
            replica.take_up(self._settings.job, name)
            if kept.placement is not None:
                record_kept(self._folder, kept.placement, replica.nodes, gang=name)
        else:
            replica = Replica(
                replace(self._settings, engine=engine),
                shard_resources(layout),
                name=name,
                num_ranks=layout.ranks,
                place=partial(self._place, name, layout.spare_experts) if layout.ranks > 1 else None,
                location=survey(self._cluster).location if generation else own_location(self._cluster),
            )
        self._replicas[number] = (generation, replica)
        self._holdings[number] = holding

    def _holding(self, engine: EngineSettings, layout: Layout) -> Holding:
        return Holding(
            model=self._digest,
            engine=replace(engine, model_path=""),
            num_ranks=layout.ranks,
            resources=shard_resources(layout),
            spare_experts=layout.spare_experts,
            location=own_location(self._cluster),
        )

    def _suits(self, placement: JsonObject | None) -> bool:
        """Whether a kept gang's experts lie well enough: one that this job would have calibrate must have done so."""
        return placement is None or self._settings.job.calibration is None or placement["origin"] == MEASURED

    def _rank_needs(self) -> RankNeeds:
        assert self._layout is not None
        layout, forecast = self._layout, self._forecast()
        knows = forecast is not None and layout.device == "cuda"
        return RankNeeds(layout=layout, forecast=forecast, gpu_bytes=self._gpu_bytes() if knows else None)

    def _forecast(self) -> Forecast | None:
        """Of the model, where it is spread; None where nothing is known of it, or it fits or doesn't as a whole."""
        layout = self._layout
        assert layout is not None
        return self._model(layout.device) if self._model is not None and layout.ranks > 1 else None

    def _others(self, number: int) -> list[Replica]:
        return [replica for other, (_, replica) in self._replicas.items() if other != number]

    def _place(self, gang: str, spare_slots: int, nodes: tuple[str, ...]) -> Seating:
        """Where a gang on these nodes holds its experts."""
        if self._experts is None:
            self._experts = ExpertLayers.of(Path(self._settings.engine.model_path))
        seating = place_experts(
            self._folder,
            self._experts,
            nodes,
            gang=gang,
            spare_slots=spare_slots,
            calibrates=self._settings.job.calibration is not None and not self._calibrations.gave_up,
        )
        if seating.calibrates:
            self._calibrations.begin(gang)
        return seating

    def grant(self, shard: ShardId, assignments: list[Assignment]) -> None:
        if replica := self._current(shard):
            replica.grant(shard.rank, assignments)

    def revoke(self, shard: ShardId, split: int, revision: int) -> None:
        if replica := self._current(shard):
            replica.revoke(shard.rank, split, revision)

    def listen(self, timeout_s: float) -> list[Heard | ReplicaDied | ReplicaResized]:
        """Reports, deaths and changes of size, as soon as there are any. JobError if Ray itself is gone."""
        if self._replicas:
            self._warm.head.refuse_lost()
        return self._hear(timeout_s)

    def _hear(self, timeout_s: float) -> list[Heard | ReplicaDied | ReplicaResized]:
        owners = {
            reference: (number, generation, replica)
            for number, (generation, replica) in self._replicas.items()
            for reference in replica.reports
        }
        if not owners:
            time.sleep(timeout_s)
            return []
        now = time.monotonic()
        self._forgive(now - self._looked_at - AWAY_S)
        ready = wait_for(list(owners), timeout_s)
        self._looked_at = time.monotonic()
        heard: list[Heard | ReplicaDied | ReplicaResized] = [*self._news]
        self._news.clear()
        for reference in ready:
            number, generation, replica = owners[reference]
            if number in self._replicas:
                try:
                    rank, report = replica.take(reference)
                except ReplicaLost as lost:
                    heard.append(self._lose(number, lost))
                    continue
                heard.append(Heard(ShardId(number, generation, rank), report))
                if report.calibrated is not None:
                    self._calibrations.end(replica.name)
                    record_calibration(self._folder, replica.nodes, report.calibrated, gang=replica.name)
                if report.failure is not None and report.failure.kind == "crash":
                    told = ReplicaLost(report.failure.message, 0.0)
                    heard.append(self._lose(number, replica.cause(told)))
        cut_off = self._cut_off()
        for number, (generation, replica) in list(self._replicas.items()):
            try:
                replica.check(self._looked_at, cut_off)
                change = self._look_for_room(number, generation, replica)
            except ReplicaLost as lost:
                heard.append(self._lose(number, lost))
            else:
                heard += [change] if change is not None else []
        return heard

    def _cut_off(self) -> set[str]:
        """Nodes that can't be reached, of those on which a shard loads and is silent."""
        unheard = {node for _, replica in self._replicas.values() for node in replica.unheard_nodes(self._looked_at)}
        if not unheard or self._looked_at < self._probe_at:
            return set()
        self._probe_at = self._looked_at + PROBE_S
        with suppress(RayLost):  # which is told when somebody listens
            return self._warm.head.ask(partial(lost_nodes, unheard))
        return set()

    def _look_for_room(self, number: int, generation: int, replica: Replica) -> ReplicaResized | None:
        if not replica.is_forming:
            return self._change_of_room(number, generation, replica)
        with suppress(RayLost):
            return self._warm.head.ask(partial(self._change_of_room, number, generation, replica))
        return None

    def _change_of_room(self, number: int, generation: int, replica: Replica) -> ReplicaResized | None:
        assert self._room is not None
        change = self._room.look(number, generation, replica, self._others(number), self._looked_at)
        if change is not None and change.ranks and replica.is_forming:
            self._warm.release(replica)
            self._form(number, generation, change.ranks)
        return change

    def stop(self) -> list[Heard]:
        """Stop every shard and return their last reports; who does not answer in time is ended without."""
        for _, replica in self._replicas.values():
            replica.stop()
        heard: list[Heard] = []
        deadline = time.monotonic() + STOPPING_S
        while time.monotonic() < deadline and any(replica.is_busy for _, replica in self._replicas.values()):
            try:
                heard += [event for event in self._hear(0.1) if isinstance(event, Heard)]
            except JobError:
                break
        for number, (_, replica) in self._replicas.items():
            placement = record_of(self._folder, replica.name) if replica.num_ranks > 1 else None
            self._warm.keep(Kept(self._holdings[number], replica, placement))
        self._replicas.clear()
        return heard

    def close(self) -> None:
        """End every shard that is not kept, and the Ray that was started for this job alone."""
        for _, replica in self._replicas.values():
            self._warm.release(replica)
        self._replicas.clear()
        if not self._lasting:
            self._warm.close()

    def _current(self, shard: ShardId) -> Replica | None:
        generation, replica = self._replicas.get(shard.replica, (None, None))
        return replica if generation == shard.generation else None

    def _lose(self, number: int, lost: ReplicaLost) -> ReplicaDied:
        generation, replica = self._replicas.pop(number)
        self._warm.release(replica)
        self._calibrations.lose(replica.name)
        return ReplicaDied(number, generation, str(lost), lost.silent_s)

    def _forgive(self, seconds: float) -> None:
        if seconds > 0:
            for _, replica in self._replicas.values():
                replica.forgive(seconds)


def assignment(lease: Lease, split: Split, commits: Mapping[int, Commit]) -> Assignment:
    """A lease, with all that a shard needs to carry it out."""
    commit = commits.get(lease.split)
    return Assignment(
        split=split.to_json(),
        revision=lease.revision,
        start=lease.start,
        stop=lease.stop,
        base=Base(part=commit.part, sha256=commit.sha256, rows=commit.rows) if commit else None,
        retry_errors=lease.retry_errors,
        condemned=lease.condemned,
    )


def shard_resources(layout: Layout) -> Resources:
    """What each shard asks of its node."""
    return Resources(
        num_cpus=layout.threads, num_gpus=1 if layout.device == "cuda" else 0, memory_bytes=layout.memory_bytes
    )


def this_machine() -> Machine:
    return Machine(num_cpus=devices.num_cpus(), num_gpus=devices.num_gpus(), memory_bytes=devices.memory_bytes())
