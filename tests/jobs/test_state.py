"""The job's state machine, event by event: what it orders and when a job ends."""

from __future__ import annotations

import pytest

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


@pytest.mark.parametrize("retry_errors", [False, True])
@pytest.mark.parametrize("killers", [{0}, {1023}, {511}, {341}, {7, 700}])
def test_few_deaths_tell_which_rows_kill_also_where_failed_rows_run_again(killers: set[int], retry_errors: bool):
    commits = {0: CommittedSplit(revision=0, rows=1024, errors=len(killers))} if retry_errors else {}
    state = JobState([1024], commits, num_replicas=1, max_error_rate=0.5, retry_errors=retry_errors)
    begin(state)
    generation, received, condemned = 0, 0, set[int]()
    while state.phase == "running":
        shard = ShardId(0, generation, 0)
        (lease,) = leases(state.handle(ShardHungry(shard, received, 1)))
        if lease.condemned:
            condemned.add(lease.start)
        if any(lease.start <= row < lease.stop for row in killers - condemned):
            state.handle(ReplicaDied(0, generation, "SIGKILL"))
            generation, received = generation + 1, 0
            continue
        rows, errors = (1024, len(killers)) if retry_errors else (lease.stop, len(condemned))
        result = Result(
            split=0,
            revision=lease.revision,
            start=lease.start,
            stop=lease.stop,
            rows=rows,
            errors=errors,
            path="attempt",
        )
        for event in (AttemptFinished(shard, result), Committed(result)):
            state.handle(event)
        again = leases(state.handle(Published(result)))
        assert not again, "it is hungry no more"
        received += 1
    assert state.outcome is None, state.outcome
    assert condemned == killers
    assert state.num_deaths <= 2 + 12 * len(killers)


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
    state = JobState([4], {}, num_replicas=1, max_error_rate=0.5, indexes=True)
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
