"""The job's state machine in a small world where workers die and messages come late, twice or in any order."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.events import (
    Action,
    AttemptFinished,
    Audit,
    Audited,
    Commit,
    Committed,
    CommittedSplit,
    Discard,
    EnsureIndex,
    Event,
    Finish,
    Grant,
    IndexReady,
    Lease,
    Publish,
    Published,
    ReplicaDied,
    ReplicaResized,
    ReplicasStopped,
    Reported,
    Result,
    Revoke,
    ShardHungry,
    ShardId,
    Started,
    StartReplica,
    StopReplicas,
    StopRequested,
    WriteReport,
)
from jobs.leases import DEATHS_OF_A_ROW, DEATHS_OF_A_SUSPECT
from jobs.state import MAX_IDLE_DEATHS, JobState

Rows = dict[int, str]  # offset in the split -> ok | bad | worker_killed


@dataclass
class World:
    """Workers, disk and messages as the controller would meet them; every choice is `chance`'s.

    `killers` and `bad_rows` are (split, offset). `deaths` is how many workers die for no reason of the rows'.
    """

    split_rows: list[int]
    chance: random.Random
    num_replicas: int = 1
    ranks: int = 1
    killers: frozenset[tuple[int, int]] = frozenset()
    bad_rows: frozenset[tuple[int, int]] = frozenset()
    deaths: int = 0
    changes_of_room: int = 0  # nodes come and go, and with them ranks; the first replica never loses all of them
    parts: dict[int, tuple[int, Rows]] = field(default_factory=dict)  # split -> revision, rows
    written: Counter[tuple[int, int]] = field(default_factory=Counter)
    attempts: dict[str, Rows] = field(default_factory=dict)
    actions: list[Action] = field(default_factory=list)
    condemned: set[tuple[int, int]] = field(default_factory=set)

    def committed(self) -> dict[int, CommittedSplit]:
        return {
            split: CommittedSplit(
                revision=revision, rows=len(rows), errors=sum(status != "ok" for status in rows.values())
            )
            for split, (revision, rows) in self.parts.items()
        }

    def state(self, **options: object) -> JobState:
        defaults: dict[str, object] = {"max_error_rate": 1.0, "num_replicas": self.num_replicas, "ranks": self.ranks}
        return JobState(self.split_rows, self.committed(), **(defaults | options))  # type: ignore[arg-type]

    def run(self, state: JobState, *, stop_after: int | None = None) -> str:
        """Until the job finishes, or is asked to stop after so many events; returns the outcome's kind."""
        self.alive: dict[int, int] = {}  # replica -> generation
        self.sizes: dict[int, int] = {}  # replica -> ranks that have room
        self.asked: set[tuple[int, int]] = set()  # replicas and generations that have asked for work
        self.leases: dict[ShardId, list[Lease]] = {}
        self.received: Counter[ShardId] = Counter()
        pool: list[Event] = []
        self.act(state.handle(Started()), pool)
        for step in range(20_000):
            if state.phase == "finished":
                assert state.outcome is not None
                return state.outcome.kind
            if step == stop_after:
                pool.append(StopRequested())
            self.something_happens(pool)
            if pool:
                event = pool[self.chance.randrange(len(pool))]
                if self.chance.random() > 0.2 or isinstance(event, StopRequested):  # else it will come again
                    pool.remove(event)
                self.act(state.handle(event), pool)
        pytest.fail("the job does not end")

    def something_happens(self, pool: list[Event]) -> None:
        for replica, generation in list(self.alive.items()):
            if self.deaths and self.chance.random() < 0.05:
                self.deaths -= 1
                self.die(replica, pool)
                continue
            if self.changes_of_room and self.chance.random() < 0.1:
                self.changes_of_room -= 1
                self.resize(replica, generation, pool)
                continue
            if not self.sizes[replica]:
                continue
            shard = ShardId(replica, generation, self.chance.randrange(self.sizes[replica]))
            held = self.leases.get(shard, [])
            if held and self.chance.random() < 0.5:
                lease = held.pop(self.chance.randrange(len(held)))
                if not lease.condemned and any(
                    (lease.split, offset) in self.killers for offset in self.computed(lease)
                ):
                    held.append(lease)
                    self.die(replica, pool)
                else:
                    pool.append(AttemptFinished(shard, self.compute(lease)))
            elif len(pool) < 10 and self.chance.random() < 0.5:
                self.asked.add((replica, generation))
                pool.append(ShardHungry(shard, self.received[shard], self.chance.randrange(4)))

    def resize(self, replica: int, generation: int, pool: list[Event]) -> None:
        """A gang has other ranks only once it has died, and before it asks for work."""
        if generation and (replica, generation) not in self.asked:
            self.sizes[replica] = self.chance.randrange(0 if replica else 1, self.ranks + 1)
            pool.append(ReplicaResized(replica, generation, self.sizes[replica], "a node is gone"))

    def die(self, replica: int, pool: list[Event]) -> None:
        generation = self.alive.pop(replica)
        pool.append(ReplicaDied(replica, generation, "killed"))

    def computed(self, lease: Lease) -> list[int]:
        base = self.parts.get(lease.split, (-1, {}))[1]
        return [
            offset
            for offset in range(lease.start, lease.stop)
            if offset not in base or (lease.retry_errors and base[offset] != "ok")
        ]

    def compute(self, lease: Lease) -> Result:
        revision, base = self.parts.get(lease.split, (-1, {}))
        rows = dict(base)
        for offset in self.computed(lease):
            row = (lease.split, offset)
            rows[offset] = "bad" if row in self.bad_rows else "ok"
            if lease.condemned and offset == lease.start:
                rows[offset] = "worker_killed"
                self.condemned.add(row)
        path = f"attempt-{len(self.attempts)}"
        self.attempts[path] = rows
        return Result(
            split=lease.split,
            revision=lease.revision,
            start=lease.start,
            stop=lease.stop,
            rows=len(rows),
            errors=sum(status != "ok" for status in rows.values()),
            path=path,
        )

    def act(self, actions: list[Action], pool: list[Event]) -> None:
        self.actions += actions
        for action in actions:
            match action:
                case StartReplica(replica, generation):
                    assert self.alive.get(replica) is None
                    self.alive[replica], self.sizes[replica] = generation, self.ranks
                case Grant(shard, lease):
                    if self.alive.get(shard.replica) == shard.generation:
                        gang = [ShardId(shard.replica, shard.generation, rank) for rank in range(self.ranks)]
                        beside = [held for member in gang for held in self.leases.get(member, [])]
                        assert not beside or not (lease.alone or any(held.alone for held in beside)), "not alone"
                        self.leases.setdefault(shard, []).append(lease)
                        self.received[shard] += 1
                case Revoke(shard, split, revision):
                    held = self.leases.get(shard, [])
                    held[:] = [lease for lease in held if (lease.split, lease.revision) != (split, revision)]
                case Commit(result):
                    assert self.written[result.split, result.revision] == 0, "a split is committed at most once"
                    before = self.parts.get(result.split, (-1, {}))
                    assert result.revision == before[0] + 1
                    self.written[result.split, result.revision] += 1
                    rows = self.attempts[result.path]
                    assert sorted(rows) == list(range(len(rows))), "a part has its rows from the first on, without gaps"
                    assert len(rows) >= len(before[1])
                    self.parts[result.split] = (result.revision, rows)
                    pool.append(Committed(result))
                case Publish(result):
                    pool.append(Published(result))
                case StopReplicas():
                    self.alive.clear()
                    pool.append(ReplicasStopped())
                case EnsureIndex():
                    pool.append(IndexReady())
                case Audit():
                    pool.append(Audited(()))
                case WriteReport():
                    pool.append(Reported())
                case Discard() | Finish():
                    pass

    def everything(self) -> dict[tuple[int, int], str]:
        return {(split, offset): status for split, (_, rows) in self.parts.items() for offset, status in rows.items()}

    def expected(self) -> dict[tuple[int, int], str]:
        def status(row: tuple[int, int]) -> str:
            return "worker_killed" if row in self.killers else "bad" if row in self.bad_rows else "ok"

        return {
            (split, offset): status((split, offset))
            for split, num_rows in enumerate(self.split_rows)
            for offset in range(num_rows)
        }


splits = st.lists(st.integers(1, 9), min_size=1, max_size=7)
chances = st.builds(random.Random, st.integers(0, 2**32))


# With more, a job whose workers die before they take any work is right to end, and a row that all of them had alone is
# right to be taken for what killed them.
DEATHS = min(MAX_IDLE_DEATHS, DEATHS_OF_A_SUSPECT + DEATHS_OF_A_ROW) - 1


@given(splits, chances, st.integers(1, 3), st.integers(1, 2), st.integers(0, DEATHS))
@settings(max_examples=150, deadline=None)
def test_any_order_of_events_and_deaths_leaves_every_row_committed_once(rows, chance, num_replicas, ranks, deaths):
    world = World(rows, chance, num_replicas, ranks, deaths=deaths)
    assert world.run(world.state()) == "done"
    assert world.everything() == world.expected()
    assert all(times == 1 for times in world.written.values())


@given(splits, chances, st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_gangs_that_form_again_with_other_ranks_or_wait_for_room_leave_every_row_committed_once(
    rows, chance, num_replicas, ranks
):
    world = World(rows, chance, num_replicas, ranks, deaths=DEATHS, changes_of_room=8)
    assert world.run(world.state()) == "done"
    assert world.everything() == world.expected()
    assert all(times == 1 for times in world.written.values())


@given(splits, chances, st.integers(1, 2), st.integers(1, 3), st.data())
@settings(max_examples=150, deadline=None)
def test_rows_that_kill_workers_are_found_and_no_others_condemned(rows, chance, num_replicas, ranks, data):
    """Nor those that merely shared a gang with them."""
    places = [(split, offset) for split, num_rows in enumerate(rows) for offset in range(num_rows)]
    killers = data.draw(st.frozensets(st.sampled_from(places), max_size=2))
    world = World(rows, chance, num_replicas, ranks, killers=killers, deaths=data.draw(st.integers(0, 1)))
    assert world.run(world.state()) == "done"
    assert world.condemned == set(killers)
    assert world.everything() == world.expected()


@given(splits, chances, st.lists(st.integers(0, 60), max_size=4))
@settings(max_examples=100, deadline=None)
def test_a_job_stopped_anywhere_and_started_again_ends_as_an_undisturbed_one(rows, chance, stops):
    world = World(rows, chance, num_replicas=2)
    for stop_after in stops:
        assert world.run(world.state(), stop_after=stop_after) in ("interrupted", "done")
    assert world.run(world.state()) == "done"
    assert world.everything() == world.expected()


@given(splits, chances, st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_a_limit_runs_the_first_rows_and_leaving_it_out_goes_on(rows, chance, limit):
    world = World(rows, chance)
    assert world.run(world.state(limit=limit)) == "done"
    expected = list(world.expected())
    assert sorted(world.everything()) == expected[:limit]
    before = dict(world.attempts)
    assert world.run(world.state()) == "done"
    assert world.everything() == world.expected()
    assert len(world.attempts) >= len(before)


@given(splits, chances, st.data())
@settings(max_examples=100, deadline=None)
def test_failed_rows_are_tried_again_once_and_only_they(rows, chance, data):
    places = [(split, offset) for split, num_rows in enumerate(rows) for offset in range(num_rows)]
    bad = data.draw(st.frozensets(st.sampled_from(places)))
    world = World(rows, chance, bad_rows=bad)
    assert world.run(world.state()) == "done"
    still_bad = frozenset(row for row in bad if data.draw(st.booleans()))
    world.bad_rows = still_bad
    revisions = {split: revision for split, (revision, _) in world.parts.items()}
    assert world.run(world.state(retry_errors=True)) == "done"
    assert world.everything() == world.expected()
    touched = {split for split, (revision, _) in world.parts.items() if revision != revisions[split]}
    assert touched == {split for split, _ in bad}
    assert all(revision <= revisions[split] + 1 for split, (revision, _) in world.parts.items())


def test_rows_that_all_kill_end_the_job_though_each_is_found():
    world = World([64], random.Random(1), killers=frozenset((0, offset) for offset in range(64)))
    state = world.state()
    assert world.run(state) == "failed"
    assert 0 < len(world.condemned) < 5


def test_an_engine_that_dies_at_every_row_ends_the_job_instead_of_dying_for_ever():
    rows = [64] * 50
    world = World(rows, random.Random(1), killers=frozenset((s, o) for s in range(50) for o in range(64)))
    state = world.state()
    assert world.run(state) == "failed"
    assert state.num_deaths < 30
    assert state.outcome is not None
    assert "without serving a row" in state.outcome.message
