"""Who works on what: splits that wait, shards that hold leases, and suspects that run alone. Pure, as `state.py` is."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from jobs.events import Grant, Lease, ShardHungry, ShardId

DEATHS_OF_A_SUSPECT = 2
DEATHS_OF_A_ROW = 2


@dataclass(slots=True, kw_only=True)
class SplitProgress:
    """One split's way. Rows below `settled` are committed for good, rows up to `target` are asked for in this run."""

    target: int
    settled: int
    revision: int  # of the commit; -1 without one
    rows: int  # committed
    errors: int  # committed
    retry_errors: bool  # its commit holds failed rows that are to run again
    ceiling: int  # where the next lease ends: target, or less while a suspect is being halved
    bound: int = 0  # of the rows from `settled` up to here, which killed when they ran alone, one kills; 0: not known
    status: Literal["waiting", "leased", "committing", "publishing", "done"] = "done"
    holder: ShardId | None = None  # exactly while leased
    deaths: int = 0
    row_deaths: int = 0
    condemned: bool = False  # the row at `settled` kills workers

    @property
    def is_suspect(self) -> bool:
        return self.deaths >= DEATHS_OF_A_SUSPECT

    def blame(self, *, alone: bool) -> None:
        """It was leased when its replica died; `alone`: nothing else was."""
        self.deaths += 1
        if not alone:
            return
        if self.ceiling - self.settled > 1:
            self.bound = self.ceiling
            self.ceiling = self.settled + (self.ceiling - self.settled) // 2
            return
        self.row_deaths += 1
        self.condemned = self.row_deaths >= DEATHS_OF_A_ROW

    def advance(self, *, revision: int, settled: int, rows: int, errors: int) -> None:
        """A commit was written. Where that was a half that kills nobody, the other half is halved next."""
        self.revision, self.settled, self.rows, self.errors = revision, settled, rows, errors
        if self.condemned or self.bound <= settled:
            self.ceiling, self.bound = self.target, 0
        else:
            self.ceiling = settled + max((self.bound - settled) // 2, 1)
        self.row_deaths, self.condemned = 0, False
        if settled >= self.target:
            self.retry_errors = False


@dataclass(slots=True, kw_only=True)
class _Shard:
    granted: int = 0
    wanted: int = 0  # leases that it would still take, those under way counted off
    holds: set[int] = field(default_factory=set)


@dataclass(slots=True, kw_only=True)
class _Replica:
    ranks: int  # 0 while there is no room for it
    generation: int = 0
    alone: bool = False  # a suspect has it for itself


class LeaseBook:
    """Every split is waiting, held by one living shard, or neither (being committed, or done)."""

    def __init__(self, splits: list[SplitProgress], *, ranks: int) -> None:
        """`ranks`: a replica's, unless it is resized."""
        self._splits = splits
        self._ranks = ranks
        self._heap: list[int] = []  # lowest split first; entries that no longer wait are skipped
        self._num_waiting = 0  # in the heap
        self._suspects: deque[int] = deque()
        self._replicas: dict[int, _Replica] = {}
        self._shards: dict[ShardId, _Shard] = {}

    def open_replica(self, replica: int) -> None:
        self._replicas[replica] = _Replica(ranks=self._ranks)

    def is_current(self, replica: int, generation: int) -> bool:
        return replica in self._replicas and self._replicas[replica].generation == generation

    def resize(self, replica: int, ranks: int) -> None:
        """Its next shards are so many."""
        assert 0 <= ranks <= self._ranks, ranks
        self._replicas[replica].ranks = ranks

    @property
    def has_room(self) -> bool:
        """Whether any replica has: else all of them wait for some."""
        return any(replica.ranks for replica in self._replicas.values())

    @property
    def is_anybody_at_work(self) -> bool:
        return any(shard.holds for shard in self._shards.values())

    def put_back(self, index: int) -> None:
        """A split with rows to settle waits for a shard, or as a suspect for a replica of its own."""
        split = self._splits[index]
        split.status, split.holder = "waiting", None
        if split.is_suspect:
            self._suspects.append(index)
        else:
            heapq.heappush(self._heap, index)
            self._num_waiting += 1

    def take_out(self, index: int) -> ShardId | None:
        """The split waits no more and is leased no more. Returns who held it."""
        split = self._splits[index]
        holder, split.holder = split.holder, None
        if holder is not None:
            shard = self._shards[holder]
            shard.holds.discard(index)
            if not shard.holds:
                self._replicas[holder.replica].alone = False
        elif split.status == "waiting" and split.is_suspect:
            self._suspects.remove(index)
        elif split.status == "waiting":
            self._num_waiting -= 1
        return holder

    def hear(self, event: ShardHungry) -> None:
        if self.is_current(event.shard.replica, event.shard.generation) and 0 <= event.shard.rank < self._ranks:
            shard = self._shards.setdefault(event.shard, _Shard())
            under_way = max(0, shard.granted - event.received)
            shard.wanted = max(0, event.wanted - under_way)

    def bury(self, replica: int) -> tuple[list[int], bool]:
        """The replica died: forget its shards, await its next generation. Returns what it held, and whether alone."""
        lost = self._replicas[replica]
        was_alone, lost.alone = lost.alone, False
        held: list[int] = []
        for rank in range(self._ranks):
            shard = self._shards.pop(ShardId(replica, lost.generation, rank), None)
            held += sorted(shard.holds) if shard else ()
        lost.generation, lost.ranks = lost.generation + 1, self._ranks
        return held, was_alone

    def generation(self, replica: int) -> int:
        return self._replicas[replica].generation

    def grant(self) -> list[Grant]:
        """Lease what waits to shards that are hungry, those that hold least first.

        No shard holds more than its share of what is left, so that the last splits are spread over all. Suspects come
        last, each to a replica that holds nothing else.
        """
        grants: list[Grant] = []
        num_shards = max(1, sum(replica.ranks for replica in self._replicas.values()))
        hungry = sorted(
            (identity for identity, shard in self._shards.items() if shard.wanted),
            key=lambda identity: (len(self._shards[identity].holds), identity),
        )
        while hungry and self._num_waiting:
            num_left = self._num_waiting + sum(len(shard.holds) for shard in self._shards.values())
            share = -(-num_left // num_shards)
            served = []
            for identity in hungry:
                shard = self._shards[identity]
                if self._num_waiting and len(shard.holds) < share and not self._replicas[identity.replica].alone:
                    grants.append(self._lease(self._pop_waiting(), identity, alone=False))
                    served.append(identity)
            hungry = [identity for identity in served if self._shards[identity].wanted]
        return grants if self._num_waiting else [*grants, *self._grant_suspects()]

    def _grant_suspects(self) -> list[Grant]:
        grants = []
        busy = {identity.replica for identity, shard in self._shards.items() if shard.holds}
        for identity in sorted(self._shards):
            if self._suspects and identity.replica not in busy and self._shards[identity].wanted:
                busy.add(identity.replica)
                self._replicas[identity.replica].alone = True
                grants.append(self._lease(self._suspects.popleft(), identity, alone=True))
        return grants

    def _pop_waiting(self) -> int:
        self._num_waiting -= 1
        while True:
            index = heapq.heappop(self._heap)
            split = self._splits[index]
            if split.status == "waiting" and not split.is_suspect:
                return index

    def _lease(self, index: int, identity: ShardId, *, alone: bool) -> Grant:
        split, shard = self._splits[index], self._shards[identity]
        split.status, split.holder = "leased", identity
        shard.holds.add(index)
        shard.granted += 1
        shard.wanted -= 1
        return Grant(
            identity,
            Lease(
                split=index,
                revision=split.revision + 1,
                start=split.settled,
                stop=split.ceiling,
                retry_errors=split.retry_errors,
                condemned=split.condemned,
                alone=alone,
            ),
        )
