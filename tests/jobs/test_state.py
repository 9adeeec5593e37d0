"""The job's state machine, in a small world where workers die and messages come late, twice or in any order."""

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
    Failed,
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


# One idle death more, and a job whose workers die before they take any work is right to end.
@given(splits, chances, st.integers(1, 3), st.integers(1, 2), st.integers(0, MAX_IDLE_DEATHS - 1))
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
    deaths = MAX_IDLE_DEATHS - 1
    world = World(rows, chance, num_replicas, ranks, deaths=deaths, changes_of_room=8)
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


def begin(state: JobState) -> list[Action]:
    return state.handle(Started())


SHARD = ShardId(0, 0, 0)


def serve(state: JobState, lease: Lease, *, errors: int = 0, shard: ShardId = SHARD) -> list[Action]:
    """The lease's attempt arrives and is committed and published."""
    result = Result(
        split=lease.split,
        revision=lease.revision,
        start=lease.start,
        stop=lease.stop,
        rows=lease.stop,
        errors=errors,
        path="attempt",
    )
    assert state.handle(AttemptFinished(shard, result)) == [Commit(result)]
    assert state.handle(Committed(result)) == [Publish(result)]
    return state.handle(Published(result))


def leases(actions: list[Action]) -> list[Lease]:
    return [action.lease for action in actions if isinstance(action, Grant)]


def test_a_shard_gets_as_many_splits_as_it_wants_lowest_first():
    state = JobState([4] * 10, {}, num_replicas=1, max_error_rate=0.5)
    assert begin(state) == [StartReplica(0, 0)]
    assert [lease.split for lease in leases(state.handle(ShardHungry(SHARD, 0, 3)))] == [0, 1, 2]
    assert leases(state.handle(ShardHungry(SHARD, 0, 3))) == [], "the three that are under way count"
    assert [lease.split for lease in leases(state.handle(ShardHungry(SHARD, 3, 1)))] == [3]


def test_the_last_splits_are_shared_out():
    state = JobState([4] * 6, {}, num_replicas=2, max_error_rate=0.5)
    begin(state)
    assert len(leases(state.handle(ShardHungry(ShardId(0, 0, 0), 0, 10)))) == 3
    assert len(leases(state.handle(ShardHungry(ShardId(1, 0, 0), 0, 10)))) == 3


def test_no_more_replicas_are_started_than_there_are_splits_to_run():
    state = JobState([4, 4, 4], {0: CommittedSplit(revision=0, rows=4, errors=0)}, num_replicas=5, max_error_rate=0.5)
    assert begin(state) == [StartReplica(0, 0), StartReplica(1, 0)]


def test_a_dead_replica_is_formed_again_and_its_splits_are_leased_again():
    state = JobState([4] * 3, {}, num_replicas=1, max_error_rate=0.5)
    begin(state)
    state.handle(ShardHungry(SHARD, 0, 2))
    assert state.handle(ReplicaDied(0, 0, "SIGKILL")) == [StartReplica(0, 1)]
    assert state.handle(ReplicaDied(0, 0, "SIGKILL")) == [], "told twice"
    again = leases(state.handle(ShardHungry(ShardId(0, 1, 0), 0, 2)))
    assert [(lease.split, lease.start, lease.stop) for lease in again] == [(0, 0, 4), (1, 0, 4)]


def test_fewer_ranks_share_what_is_left_among_them():
    state = JobState([4] * 9, {}, num_replicas=2, ranks=3, max_error_rate=0.5)
    begin(state)
    state.handle(ReplicaDied(0, 0, "a node is gone"))
    first, other = ShardId(0, 1, 0), ShardId(1, 0, 0)
    assert len(leases(state.handle(ShardHungry(other, 0, 9)))) == 2, "one of six shards has two of nine splits"
    more = leases(state.handle(ReplicaResized(0, 1, 1, "one rank has room")))
    assert len(more) == 1, "one of four has three"
    assert len(leases(state.handle(ShardHungry(first, 0, 9)))) == 3


def test_a_replica_without_room_waits_and_the_others_take_its_share():
    state = JobState([4] * 6, {}, num_replicas=2, max_error_rate=0.5)
    begin(state)
    assert state.handle(ReplicaDied(0, 0, "a node is gone")) == [StartReplica(0, 1)]
    assert len(leases(state.handle(ShardHungry(ShardId(1, 0, 0), 0, 9)))) == 3
    assert state.handle(ReplicaResized(0, 0, 0, "no room")) == [], "of a generation that is no more"
    shared = leases(state.handle(ReplicaResized(0, 1, 0, "no room")))
    assert len(shared) == 3
    assert state.handle(ReplicaResized(0, 1, 1, "there is room again")) == []
    assert state.phase == "running"


def test_a_job_ends_when_no_replica_has_room_and_says_why():
    state = JobState([4] * 6, {}, num_replicas=2, max_error_rate=0.5)
    begin(state)
    state.handle(ReplicaDied(0, 0, "a node is gone"))
    state.handle(ReplicaDied(1, 0, "a node is gone"))
    assert state.handle(ReplicaResized(1, 1, 0, "no room")) == []
    assert state.handle(ReplicaResized(0, 1, 0, "no room")) == [StopReplicas()]
    (finish,) = state.handle(ReplicasStopped())
    assert isinstance(finish, Finish)
    assert (finish.outcome.kind, finish.outcome.message) == ("failed", "no room; what is committed is kept")


def test_a_replica_that_dies_again_and_again_ends_a_job_only_when_no_other_works():
    state = JobState([4] * 2, {}, num_replicas=2, max_error_rate=0.5)
    begin(state)
    other = ShardId(1, 0, 0)
    (lease,) = leases(state.handle(ShardHungry(other, 0, 1)))
    for generation in range(3 * MAX_IDLE_DEATHS):
        assert state.handle(ReplicaDied(0, generation, "SIGKILL")) == [StartReplica(0, generation + 1)]
    serve(state, lease, shard=other)
    for generation in range(3 * MAX_IDLE_DEATHS, 4 * MAX_IDLE_DEATHS):
        assert state.handle(ReplicaDied(0, generation, "SIGKILL")) == [StartReplica(0, generation + 1)]
    assert state.handle(ReplicaDied(0, 4 * MAX_IDLE_DEATHS, "SIGKILL")) == [StopReplicas()]


def test_an_attempt_of_a_dead_shard_still_counts_and_spares_the_next_one_the_work():
    state = JobState([4], {}, num_replicas=1, max_error_rate=0.5)
    begin(state)
    (lease,) = leases(state.handle(ShardHungry(SHARD, 0, 1)))
    state.handle(ReplicaDied(0, 0, "SIGKILL"))
    heir = ShardId(0, 1, 0)
    assert leases(state.handle(ShardHungry(heir, 0, 1))) == [lease]
    result = Result(split=0, revision=0, start=0, stop=4, rows=4, errors=0, path="late")
    assert state.handle(AttemptFinished(SHARD, result)) == [Commit(result), Revoke(heir, 0, 0)]
    second = Result(split=0, revision=0, start=0, stop=4, rows=4, errors=0, path="second")
    assert state.handle(AttemptFinished(heir, second)) == [Discard(second)]


def test_suspects_run_alone_after_all_others():
    state = JobState([8, 8, 8], {}, num_replicas=1, max_error_rate=0.5)
    begin(state)
    for generation in range(2):
        shard = ShardId(0, generation, 0)
        assert [lease.split for lease in leases(state.handle(ShardHungry(shard, 0, 1)))] == [0]
        state.handle(ReplicaDied(0, generation, "SIGKILL"))
    shard = ShardId(0, 2, 0)
    others = leases(state.handle(ShardHungry(shard, 0, 5)))
    assert [(lease.split, lease.alone) for lease in others] == [(1, False), (2, False)]
    serve(state, others[0], shard=shard)
    (suspect,) = leases(serve(state, others[1], shard=shard))
    assert (suspect.split, suspect.alone, suspect.start, suspect.stop) == (0, True, 0, 8)
    state.handle(ReplicaDied(0, 2, "SIGKILL"))
    (half,) = leases(state.handle(ShardHungry(ShardId(0, 3, 0), 0, 5)))
    assert (half.split, half.alone, half.start, half.stop) == (0, True, 0, 4)


def test_a_replica_that_runs_a_suspect_gets_nothing_else_until_it_is_done():
    state = JobState([8] * 6, {}, num_replicas=2, max_error_rate=0.5)
    begin(state)
    for generation in range(2):
        assert leases(state.handle(ShardHungry(ShardId(0, generation, 0), 0, 1)))[0].split == 0
        state.handle(ReplicaDied(0, generation, "SIGKILL"))
    other, shard = ShardId(1, 0, 0), ShardId(0, 2, 0)
    assert [lease.split for lease in leases(state.handle(ShardHungry(other, 0, 3)))] == [1, 2, 3]
    fourth, fifth = leases(state.handle(ShardHungry(shard, 0, 9)))
    serve(state, fourth, shard=shard)
    (suspect,) = leases(serve(state, fifth, shard=shard))
    assert (suspect.split, suspect.alone) == (0, True)
    assert state.handle(ReplicaDied(1, 0, "SIGKILL")) == [StartReplica(1, 1)], "three splits wait, and a hungry shard"
    assert leases(state.handle(ShardHungry(shard, 3, 9))) == []
    returned = leases(serve(state, suspect, shard=shard))
    assert [(lease.split, lease.alone) for lease in returned] == [(1, False), (2, False)]


def test_rows_that_all_kill_end_the_job_though_each_is_found():
    world = World([64], random.Random(1), killers=frozenset((0, offset) for offset in range(64)))
    state = world.state()
    assert world.run(state) == "failed"
    assert 0 < len(world.condemned) < 5


def test_workers_that_die_before_any_work_end_the_job_with_the_reason():
    state = JobState([4], {}, num_replicas=1, max_error_rate=0.5)
    begin(state)
    last = MAX_IDLE_DEATHS - 1
    for generation in range(last):
        assert state.handle(ReplicaDied(0, generation, "out of memory")) == [StartReplica(0, generation + 1)]
    assert state.handle(ReplicaDied(0, last, "out of memory")) == [StopReplicas()]
    (finish,) = state.handle(ReplicasStopped())
    assert isinstance(finish, Finish)
    assert finish.outcome.kind == "failed"
    assert "out of memory" in finish.outcome.message


def test_an_engine_that_dies_at_every_row_ends_the_job_instead_of_dying_for_ever():
    rows = [64] * 50
    world = World(rows, random.Random(1), killers=frozenset((s, o) for s in range(50) for o in range(64)))
    state = world.state()
    assert world.run(state) == "failed"
    assert state.num_deaths < 30
    assert state.outcome is not None
    assert "without serving a row" in state.outcome.message


@pytest.mark.parametrize(
    ("rate", "committed", "fails"),
    [
        (0.5, [(32, 32)], False),  # the first split of a long job may be all bad
        (0.5, [(1000, 600)], True),
        (0.01, [(32, 1)], False),
        (0.0, [(32, 1)], True),
        (1.0, [(1000, 1000)], False),
    ],
)
def test_the_error_rate_is_judged_once_enough_rows_are_in(rate, committed, fails):
    rows = [num_rows for num_rows, _ in committed] + [1000] * 20
    commits = {i: CommittedSplit(revision=0, rows=r, errors=e) for i, (r, e) in enumerate(committed)}
    state = JobState(rows, commits, num_replicas=1, max_error_rate=rate)
    (action,) = begin(state)
    assert isinstance(action, Finish) == fails


def test_a_small_job_whose_rows_mostly_fail_ends_as_soon_as_that_is_certain():
    state = JobState([4, 4, 4], {}, num_replicas=1, max_error_rate=0.5)
    begin(state)
    first, second, _ = leases(state.handle(ShardHungry(SHARD, 0, 3)))
    serve(state, first, errors=4)
    assert state.phase == "running"
    assert serve(state, second, errors=3) == [StopReplicas()]
    (finish,) = state.handle(ReplicasStopped())
    assert isinstance(finish, Finish)
    assert finish.outcome.message.startswith("7 of 8 rows failed (88%) and limits.max_error_rate is 0.5")


def test_errors_that_are_to_be_tried_again_do_not_end_the_job():
    commits = {0: CommittedSplit(revision=0, rows=4, errors=4)}
    assert isinstance(begin(JobState([4], commits, num_replicas=1, max_error_rate=0.5))[0], Finish)
    again = JobState([4], commits, num_replicas=1, max_error_rate=0.5, retry_errors=True)
    assert begin(again) == [StartReplica(0, 0)]


def test_after_the_last_commit_come_index_audit_and_report():
    state = JobState([4], {}, num_replicas=1, max_error_rate=0.5, embeds=True)
    begin(state)
    (lease,) = leases(state.handle(ShardHungry(SHARD, 0, 1)))
    assert serve(state, lease) == [StopReplicas()]
    assert state.handle(ReplicasStopped()) == [EnsureIndex()]
    assert state.handle(IndexReady()) == [Audit()]
    assert state.handle(Audited(())) == [WriteReport()]
    (finish,) = state.handle(Reported())
    assert isinstance(finish, Finish)
    assert finish.outcome.kind == "done"


def test_an_audit_that_does_not_hold_fails_the_job():
    state = JobState([4], {0: CommittedSplit(revision=0, rows=4, errors=0)}, num_replicas=1, max_error_rate=0.5)
    assert begin(state) == [Audit()]
    (finish,) = state.handle(Audited(("part-000000.parquet: a changed byte", "another")))
    assert isinstance(finish, Finish)
    assert finish.outcome.kind == "failed"
    assert "a changed byte (and 1 more)" in finish.outcome.message


def test_what_was_finished_before_a_stop_is_still_committed():
    state = JobState([4, 4], {}, num_replicas=1, max_error_rate=0.5)
    begin(state)
    first, _ = leases(state.handle(ShardHungry(SHARD, 0, 2)))
    assert state.handle(StopRequested()) == [StopReplicas()]
    assert state.handle(StopRequested()) == []
    assert serve(state, first) == [], "committed, and nothing new is begun"
    (finish,) = state.handle(ReplicasStopped())
    assert isinstance(finish, Finish)
    assert finish.outcome.kind == "interrupted"


def test_a_model_that_cannot_be_loaded_ends_the_job_as_the_users_error():
    state = JobState([4], {}, num_replicas=1, max_error_rate=0.5)
    begin(state)
    assert state.handle(Failed("model: no such folder", is_user_error=True)) == [StopReplicas()]
    (finish,) = state.handle(ReplicasStopped())
    assert isinstance(finish, Finish)
    assert finish.outcome.is_user_error
