"""Every replica of a job: started, listened to, replaced. What the controller knows of Ray is here."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from jobs.events import Lease, ReplicaDied, ShardId
from jobs.ray_session import cluster_totals, ray_session, wait_for
from jobs.spec import ClusterSpec
from pipeline.commits import Commit
from pipeline.errors import JobError, UserError
from pipeline.source import Split
from workers.assignment import Assignment, Base, ShardReport
from workers.replica import Replica, ReplicaLost, Resources
from workers.settings import ShardSettings

STOPPING_S = 15.0  # for a step under way and the parts that are being written
AWAY_S = 1.0  # between two looks at the replicas; if it was longer, the silence may be ours


@dataclass(frozen=True, slots=True)
class Heard:
    shard: ShardId
    report: ShardReport


class Fleet:
    """The living replicas by number, each with its generation. Ray is started, or joined, for the first of them."""

    def __init__(self, settings: ShardSettings, cluster: ClusterSpec) -> None:
        self._settings = settings
        self._cluster = cluster
        self._session = ExitStack()
        self._resources: Resources | None = None
        self._replicas: dict[int, tuple[int, Replica]] = {}
        self._looked_at = time.monotonic()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, replica: int, generation: int) -> None:
        """UserError or JobError if there is no Ray to be had, or it lacks what the job asks for."""
        assert replica not in self._replicas
        if self._resources is None:
            self._session.enter_context(ray_session(self._cluster.address, num_cpus=_local_cpus(self._cluster)))
            self._resources = shard_resources(self._cluster, cluster_totals())
            engine = replace(
                self._settings.engine,
                threads=self._resources.num_cpus,
                device="cuda" if self._resources.num_gpus else "cpu",
            )
            self._settings = replace(self._settings, engine=engine)
        name = f"worker-{replica}.{generation}"
        self._replicas[replica] = (generation, Replica(self._settings, self._resources, name=name))

    def grant(self, shard: ShardId, assignments: list[Assignment]) -> None:
        if replica := self._current(shard):
            replica.grant(shard.rank, assignments)

    def revoke(self, shard: ShardId, split: int, revision: int) -> None:
        if replica := self._current(shard):
            replica.revoke(shard.rank, split, revision)

    def listen(self, timeout_s: float) -> list[Heard | ReplicaDied]:
        """Reports and deaths, as soon as there are any. JobError if a replica can't be formed."""
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
        heard: list[Heard | ReplicaDied] = []
        for reference in ready:
            number, generation, replica = owners[reference]
            if number in self._replicas:
                try:
                    rank, report = replica.take(reference)
                except ReplicaLost as lost:
                    heard.append(self._lose(number, str(lost)))
                    continue
                heard.append(Heard(ShardId(number, generation, rank), report))
                if report.failure is not None and report.failure.kind == "crash":
                    heard.append(self._lose(number, report.failure.message))
        for number, (_, replica) in list(self._replicas.items()):
            try:
                replica.check(self._looked_at)
            except ReplicaLost as lost:
                heard.append(self._lose(number, str(lost)))
        return heard

    def stop(self) -> list[Heard]:
        """Stop every shard and return their last reports; who does not answer in time is ended without."""
        for _, replica in self._replicas.values():
            replica.stop()
        heard: list[Heard] = []
        deadline = time.monotonic() + STOPPING_S
        while time.monotonic() < deadline and any(replica.is_busy for _, replica in self._replicas.values()):
            try:
                heard += [event for event in self.listen(0.1) if isinstance(event, Heard)]
            except JobError:
                break
        self._release()
        return heard

    def close(self) -> None:
        """End every shard, and the Ray that was started for them."""
        self._release()
        self._session.close()

    def _release(self) -> None:
        for _, replica in self._replicas.values():
            replica.release()
        self._replicas.clear()

    def _current(self, shard: ShardId) -> Replica | None:
        generation, replica = self._replicas.get(shard.replica, (None, None))
        return replica if generation == shard.generation else None

    def _lose(self, number: int, reason: str) -> ReplicaDied:
        generation, replica = self._replicas.pop(number)
        replica.release()
        return ReplicaDied(number, generation, reason)

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


def shard_resources(cluster: ClusterSpec, totals: Mapping[str, float]) -> Resources:
    """What each shard asks of its node. `totals`: what the whole cluster has.

    `threads: auto` shares the CPUs out among the shards; `device: auto` takes GPUs where there is one for each.
    """
    num_shards = num_replicas(cluster)
    num_gpus = int(totals.get("GPU", 0))
    if cluster.device == "cuda" and num_gpus < num_shards:
        raise UserError(f"cluster.device: cuda needs a GPU for each of {num_shards} shards, and Ray sees {num_gpus}")
    uses_gpu = cluster.device == "cuda" or (cluster.device == "auto" and num_gpus >= num_shards)
    threads = max(1, int(totals.get("CPU", 1)) // num_shards) if cluster.threads == "auto" else cluster.threads
    return Resources(num_cpus=threads, num_gpus=1 if uses_gpu else 0)


def num_replicas(cluster: ClusterSpec) -> int:
    return 1 if cluster.replicas == "auto" else cluster.replicas


def _local_cpus(cluster: ClusterSpec) -> int:
    """What a Ray of our own is told that this machine has: the CPUs, or more where the job insists on more threads."""
    wanted = num_replicas(cluster) * (1 if cluster.threads == "auto" else cluster.threads)
    return max(len(os.sched_getaffinity(0)), wanted)
