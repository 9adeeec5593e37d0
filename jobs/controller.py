"""Carries out what the state machine orders, and tells it what came of it. One process, one writer of commits.

JobState.handle(event) -> actions -> replicas, commit log, index, audit, report -> events -> ...
"""

from __future__ import annotations

import logging
from typing import Protocol

from jobs.events import (
    Action,
    AttemptFinished,
    Audit,
    Audited,
    Commit,
    Committed,
    Discard,
    EnsureIndex,
    Event,
    Failed,
    Finish,
    Grant,
    IndexReady,
    Lease,
    Outcome,
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
from jobs.fleet import Heard, assignment
from jobs.state import JobState
from jobs.store import JobStore
from jobs.tally import Tally
from pipeline.attempt import Attempt
from pipeline.errors import JobError, UserError
from workers.assignment import Assignment, FinishedAssignment

LISTEN_S = 0.25

log = logging.getLogger(__name__)


class Workers(Protocol):
    """What the controller needs of `fleet.Fleet`."""

    def start(self, replica: int, generation: int) -> None: ...
    def grant(self, shard: ShardId, assignments: list[Assignment]) -> None: ...
    def revoke(self, shard: ShardId, split: int, revision: int) -> None: ...
    def listen(self, timeout_s: float) -> list[Heard | ReplicaDied | ReplicaResized]: ...
    def stop(self) -> list[Heard]: ...


class Finishing(Protocol):
    """What comes after the last commit; see `finishing.py`."""

    def ensure_index(self) -> None: ...
    def audit(self) -> tuple[str, ...]: ...
    def report(self) -> None: ...


class Controller:
    """Runs one job from where its commits end. `stop` may be called from a signal handler."""

    def __init__(self, store: JobStore, state: JobState, workers: Workers, finishing: Finishing, tally: Tally) -> None:
        self._store = store
        self._state = state
        self._workers = workers
        self._finishing = finishing
        self._tally = tally
        self._stop_requested = False
        self._attempts: dict[str, Attempt] = {}  # path -> what a worker wrote, until it is committed

    @property
    def is_running_rows(self) -> bool:
        """Whether workers are at work, so that stopping is to wait for what they have in hand."""
        return self._state.phase in ("running", "draining")

    def stop(self) -> None:
        self._stop_requested = True

    def run(self) -> Outcome:
        self._handle(Started())
        while self._state.phase != "finished":
            assert self._state.phase == "running", self._state.phase
            if self._stop_requested:
                self._handle(StopRequested())
            else:
                for event in self._listen():
                    self._handle(event)
                self._tally.show()  # once what was handed over is committed: before, its rows are in neither count
        assert self._state.outcome is not None
        return self._state.outcome

    def _handle(self, event: Event) -> None:
        """Carry out what the event leads to, and what that leads to, in order. What fails ends the job."""
        for action in self._state.handle(event):
            try:
                consequences = self._carry_out(action)
            except UserError as error:
                consequences = [Failed(str(error), is_user_error=True)]
            except JobError as error:
                consequences = [Failed(str(error))]
            for consequence in consequences:
                self._handle(consequence)

    def _listen(self) -> list[Event]:
        try:
            heard = self._workers.listen(LISTEN_S)
        except JobError as error:
            return [Failed(str(error))]
        events: list[Event] = []
        for news in heard:
            if isinstance(news, ReplicaDied):
                log.warning("replica %d died: %s", news.replica, news.reason)
                self._tally.mourn(news)
                events.append(news)
            elif isinstance(news, ReplicaResized):
                log.warning("replica %d has room for %d ranks: %s", news.replica, news.ranks, news.reason)
                self._tally.resize(news)
                events.append(news)
            else:
                events += self._take(news)
        return events

    def _take(self, heard: Heard) -> list[Event]:
        report = heard.report
        self._tally.take(heard.shard, report)
        events: list[Event] = [AttemptFinished(heard.shard, self._result(finished)) for finished in report.finished]
        if report.failure is not None and report.failure.kind != "crash":
            events.append(Failed(report.failure.message, report.failure.kind == "user"))
        elif report.wanted:
            events.append(ShardHungry(heard.shard, report.received, report.wanted))
        return events

    def _result(self, finished: FinishedAssignment) -> Result:
        attempt = Attempt.from_json(finished.attempt)
        self._attempts[attempt.path] = attempt
        return Result(
            split=finished.index,
            revision=finished.revision,
            start=finished.start,
            stop=finished.stop,
            rows=attempt.rows,
            errors=attempt.errors,
            path=attempt.path,
        )

    def _carry_out(self, action: Action) -> list[Event]:
        match action:
            case StartReplica(replica, generation):
                self._workers.start(replica, generation)
            case Grant(shard, lease):
                self._workers.grant(shard, [self._assignment(lease)])
                self._tally.grant(shard, lease)
            case Revoke(shard, split, revision):
                self._workers.revoke(shard, split, revision)
            case Commit(result):
                self._store.log.commit(self._attempts.pop(result.path))
                return [Committed(result)]
            case Publish(result):
                self._store.log.publish(self._store.log.commits[result.split])
                self._tally.commit(result.split, rows=result.rows, errors=result.errors)
                return [Published(result)]
            case Discard(result):
                self._attempts.pop(result.path, None)
                (self._store.folder.root / result.path).unlink(missing_ok=True)
            case StopReplicas():
                return [*(event for heard in self._workers.stop() for event in self._take(heard)), ReplicasStopped()]
            case EnsureIndex():
                self._tally.enter("index")
                self._finishing.ensure_index()
                return [IndexReady()]
            case Audit():
                self._tally.enter("audit")
                return [Audited(self._finishing.audit())]
            case WriteReport():
                self._tally.enter("report")
                self._finishing.report()
                return [Reported()]
            case Finish():
                self._tally.show(at_once=True)
        return []

    def _assignment(self, lease: Lease) -> Assignment:
        return assignment(lease, self._store.job.splits[lease.split], self._store.log.commits)
