"""Replicas that stay when a job is over, with the Ray that they run on, for the jobs that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from jobs.cluster.head_watch import HeadWatch, RayLost
from jobs.ray_session import address_of, is_joined, ray_session
from jobs.spec import JsonObject
from pipeline.errors import UserError
from workers.replica import Location, Replica, Resources
from workers.settings import EngineSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What a replica is, whatever job it runs. `engine` has no path: equal files may lie elsewhere."""

    model: Mapping[str, str]  # its files' names and digests
    engine: EngineSettings
    num_ranks: int
    resources: Resources  # of each rank
    spare_experts: int
    location: Location  # as the job asked


@dataclass(frozen=True, slots=True)
class Kept:
    holding: Holding
    replica: Replica
    placement: JsonObject | None  # the last record of where its experts lie, of a gang


class WarmReplicas:
    """Keeps a Ray, and on it the replicas of jobs that are over: `with WarmReplicas() as warm: run(job, warm=warm)`.

    A job takes the replicas that hold just what it needs, and others are ended before it starts some of its own. Jobs
    run one after another. Closing ends all replicas, and the Ray if it was started here.
    """

    def __init__(self, *, keeps: bool = True) -> None:
        """`keeps` False: only for one job."""
        self.keeps = keeps
        self._session = ExitStack()
        self._address: str | None = None
        self._own_cpus: int | None = None  # that a Ray started here was told of
        self._is_connected = False
        self._kept: list[Kept] = []
        self._head: HeadWatch | None = None

    def __enter__(self) -> WarmReplicas:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def joins(self, address: str | None) -> bool:
        """Whether jobs run on a Ray that runs without us."""
        return self._own_cpus is None and is_joined(address)

    def connect(self, address: str | None, *, num_cpus: int) -> None:
        """Join the Ray at `address` (None: RAY_ADDRESS), or start one with so many CPUs, unless that was done before.

        UserError for another address than before, or one that can't be joined; JobError if Ray does not start.
        """
        if self._is_connected and address_of(address) != self._address:
            raise UserError(
                f"cluster.address: {address_of(address) or 'a Ray of its own'}, but these replicas are kept on "
                f"{self._address or 'a Ray of their own'}; run this job without them"
            )
        if self._own_cpus is not None and num_cpus > self._own_cpus:
            self.close()
        if self._is_connected:
            return
        joins = is_joined(address)
        self._session.enter_context(ray_session(address, num_cpus=num_cpus))
        self._address, self._own_cpus, self._is_connected = address_of(address), None if joins else num_cpus, True
        self._head = HeadWatch.of_connected_ray(own=not joins)

    @property
    def head(self) -> HeadWatch:
        """Whether the Ray that is connected is still there."""
        assert self._head is not None, "connect comes first"
        return self._head

    def release(self, replica: Replica) -> None:
        """End a replica; where Ray is gone, what is left of it ends by itself."""
        with suppress(RayLost):
            self.head.ask(replica.release)

    def take(self, holding: Holding, *, suits: Callable[[JsonObject | None], bool]) -> Kept | None:
        """One that is kept and now the caller's; `suits` judges the record of its placement.

        Where there is none, all that are kept make room.
        """
        for kept in self._kept:
            if kept.holding == holding and suits(kept.placement):
                self._kept.remove(kept)
                return kept
        self._release()
        return None

    def keep(self, kept: Kept) -> None:
        """Keep a replica whose job is over; one that has not come to its end in peace is ended."""
        if self.keeps and kept.replica.is_free:
            self._kept.append(kept)
        else:
            self.release(kept.replica)

    def close(self) -> None:
        self._release()
        if self._head is not None:
            self._head.close()
        self._session.close()
        self._is_connected, self._own_cpus = False, None

    def _release(self) -> None:
        for kept in self._kept:
            self.release(kept.replica)
        self._kept.clear()
