"""The job as a pure state machine: an event in, actions out. No clock, no I/O, no Ray, no chance.

    new -> running -> draining -> indexing -> auditing -> reporting -> finished
                         |  (stopped, or failed)                          ^
                         +------------------------------------------------+

The controller carries out each action, in order, and feeds back what came of it. Events may come late, twice or in any
order: what they claim is checked against the state, never trusted.

A split's rows are settled from its first row on. A lease is for the rows [start, stop) of one split; its attempt
becomes the split's next revision, a whole part: what was committed before, and these rows. So the rest of a split that
--limit cut, failed rows that are tried again, and one half of a split that killed a worker are all the same thing.

A split that was leased at two deaths of a replica is a suspect: it runs alone. When its replica dies again it is
halved (stop moves half-way to start) until one row is left; when that row alone kills twice it becomes an error row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

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
    IndexReady,
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
from jobs.leases import LeaseBook, SplitProgress

MAX_IDLE_DEATHS = 5  # in a row, while nobody works: that is not chance any more
JUDGED_AFTER_ROWS = 1000
JUDGED_AFTER_ERRORS = 20

Phase = Literal["new", "running", "draining", "indexing", "auditing", "reporting", "finished"]


class JobState:
    """The whole state of a run. `handle` is its one transition: what it does depends on the state and the event alone.

    `split_rows`: the rows of each split, in order. `committed`: what the commits say about them as the run begins.
    `limit`: only the job's first rows. `retry_errors`: failed rows run again, once. `indexes`: the vectors are to be
    in an index before the audit.
    """

    def __init__(
        self,
        split_rows: Iterable[int],
        committed: Mapping[int, CommittedSplit],
        *,
        num_replicas: int,
        ranks: int = 1,
        max_error_rate: float,
        limit: int | None = None,
        retry_errors: bool = False,
        indexes: bool = False,
    ) -> None:
        self.phase: Phase = "new"
        self.outcome: Outcome | None = None
        self.num_deaths = 0
        self.total_rows = 0  # input rows that are committed once this run is done
        self.num_open = 0  # splits that have rows to settle
        self._indexes = indexes
        self._max_error_rate = max_error_rate
        self._ranks = ranks
        self._num_replicas = num_replicas
        self._splits: list[SplitProgress] = []
        self._book = LeaseBook(self._splits, ranks=ranks)
        self._judged_rows = self._judged_errors = 0
        self._idle_deaths = self._barren_deaths = 0
        first_row = largest = 0
        for index, num_rows in enumerate(split_rows):
            target = num_rows if limit is None else max(0, min(num_rows, limit - first_row))
            first_row += num_rows
            largest = max(largest, num_rows)
            self._add_split(index, target, committed.get(index), retry_errors)
        self._patience = 8 + 2 * largest.bit_length()  # halving down to one row takes up to that many deaths

    def _add_split(self, index: int, target: int, commit: CommittedSplit | None, retry_errors: bool) -> None:
        done = commit or CommittedSplit(revision=-1, rows=0, errors=0)
        retries = retry_errors and done.errors > 0 and target > 0
        split = SplitProgress(
            target=target,
            settled=0 if retries else done.rows,
            revision=done.revision,
            rows=done.rows,
            errors=done.errors,
            retry_errors=retries,
            ceiling=target,
        )
        self._splits.append(split)
        self.total_rows += max(target, done.rows)
        if split.settled < target:
            self.num_open += 1
            self._book.put_back(index)
        if not retries:
            self._judged_rows += done.rows
            self._judged_errors += done.errors

    def handle(self, event: Event) -> list[Action]:
        match event:
            case Started():
                return self._start() if self.phase == "new" else []
            case ShardHungry():
                self._book.hear(event)
                return self._grant()
            case AttemptFinished(shard, result):
                return self._take_attempt(shard, result)
            case Committed(result):
                return self._note_commit(result)
            case Published(result):
                return self._note_publication(result)
            case ReplicaDied():
                return self._mourn(event)
            case ReplicaResized():
                return self._resize(event)
            case Failed(message, is_user_error):
                return self._end(Outcome("failed", message, is_user_error))
            case StopRequested():
                return self._end(Outcome("interrupted"))
            case ReplicasStopped():
                return self._after_draining() if self.phase == "draining" else []
            case IndexReady():
                return self._enter("auditing", Audit()) if self.phase == "indexing" else []
            case Audited(problems):
                return self._judge_audit(problems) if self.phase == "auditing" else []
            case Reported():
                return self._finish(Outcome("done")) if self.phase == "reporting" else []

    def _start(self) -> list[Action]:
        if over := self._over_error_rate():
            return self._finish(over)
        if not self.num_open:
            return self._after_draining()
        self.phase = "running"
        replicas = range(min(self._num_replicas, -(-self.num_open // self._ranks)))
        for replica in replicas:
            self._book.open_replica(replica)
        return [StartReplica(replica, 0) for replica in replicas]

    def _grant(self) -> list[Action]:
        return [*self._book.grant()] if self.phase == "running" else []

    def _take_attempt(self, shard: ShardId, result: Result) -> list[Action]:
        """Commit the first attempt that fits where its split stands, whoever made it, and whatever was leased since."""
        split = self._splits[result.split] if 0 <= result.split < len(self._splits) else None
        if (
            split is None
            or self.phase not in ("running", "draining")
            or split.status not in ("waiting", "leased")
            or result.revision != split.revision + 1  # which says where it starts, too
            or not split.settled < result.stop <= split.target
        ):
            return [Discard(result)]
        holder = self._book.take_out(result.split)
        split.status = "committing"
        if holder is None or holder == shard:
            return [Commit(result)]
        return [Commit(result), Revoke(holder, result.split, result.revision)]

    def _note_commit(self, result: Result) -> list[Action]:
        split = self._splits[result.split]
        if split.status != "committing" or result.revision != split.revision + 1:
            return []
        split.status = "publishing"
        self._idle_deaths = 0
        if result.rows - result.errors > split.rows - split.errors:  # a row more was served
            self._barren_deaths = 0
        if not split.retry_errors:
            self._judged_rows -= split.rows
            self._judged_errors -= split.errors
        split.advance(revision=result.revision, settled=result.stop, rows=result.rows, errors=result.errors)
        if not split.retry_errors:
            self._judged_rows += split.rows
            self._judged_errors += split.errors
        return [Publish(result)]

    def _note_publication(self, result: Result) -> list[Action]:
        split = self._splits[result.split]
        if split.status != "publishing" or result.revision != split.revision:
            return []
        if split.settled < split.target:
            self._book.put_back(result.split)
        else:
            split.status = "done"
            self.num_open -= 1
        if self.phase != "running":
            return []
        if over := self._over_error_rate():
            return self._end(over)
        if not self.num_open:
            self.phase = "draining"
            return [StopReplicas()]
        return self._grant()

    def _mourn(self, event: ReplicaDied) -> list[Action]:
        if not self._book.is_current(event.replica, event.generation):
            return []
        self.num_deaths += 1
        orphans, was_alone = self._book.bury(event.replica)
        for index in orphans:
            self._splits[index].blame(alone=was_alone)
            self._book.put_back(index)
        if self.phase != "running":
            return []
        if orphans:
            self._barren_deaths += 1
        else:
            self._idle_deaths += 1
        # What one cause does to each is not a habit; and while others work, one that can't come up does no harm.
        if self._idle_deaths >= MAX_IDLE_DEATHS + self._num_replicas - 1 and not self._book.is_anybody_at_work:
            return self._end(Outcome("failed", f"workers die before they take any work: {event.reason}"))
        if self._barren_deaths > self._patience:
            times = f"{self._barren_deaths} times"
            return self._end(Outcome("failed", f"workers died {times} without serving a row: {event.reason}"))
        return [StartReplica(event.replica, self._book.generation(event.replica)), *self._grant()]

    def _resize(self, event: ReplicaResized) -> list[Action]:
        """Some ranks fewer, or none for now: those that are left share what is to be done."""
        if not self._book.is_current(event.replica, event.generation):
            return []
        self._book.resize(event.replica, event.ranks)
        if self.phase == "running" and not self._book.has_room:
            return self._end(Outcome("failed", f"{event.reason}; what is committed is kept"))
        return self._grant()

    def _over_error_rate(self) -> Outcome | None:
        """Judged against at least JUDGED_AFTER_ROWS rows, or as many as let JUDGED_AFTER_ERRORS pass, or all there are.

        So a job of millions is not ended by its first bad rows, and one that can no longer succeed ends at once.
        """
        rate, errors, rows = self._max_error_rate, self._judged_errors, self._judged_rows
        enough = max(JUDGED_AFTER_ROWS, JUDGED_AFTER_ERRORS / rate if rate else math.inf)
        if errors <= rate * max(rows, min(self.total_rows, enough)):
            return None
        return Outcome(
            "failed",
            f"{errors:,} of {rows:,} rows failed ({errors / rows:.0%}) and limits.max_error_rate is {rate:g}; "
            "what is committed is kept",
        )

    def _end(self, outcome: Outcome) -> list[Action]:
        """Failed or stopped. The first reason counts; what runs is drained first."""
        if self.phase == "finished":
            return []
        if self.phase not in ("running", "draining"):
            return self._finish(outcome)
        self.outcome = self.outcome or outcome
        if self.phase == "draining":
            return []
        self.phase = "draining"
        return [StopReplicas()]

    def _after_draining(self) -> list[Action]:
        if self.outcome is not None:
            return self._finish(self.outcome)
        return self._enter("indexing", EnsureIndex()) if self._indexes else self._enter("auditing", Audit())

    def _judge_audit(self, problems: tuple[str, ...]) -> list[Action]:
        if not problems:
            return self._enter("reporting", WriteReport())
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return self._finish(Outcome("failed", f"the audit does not hold: {problems[0]}{more}"))

    def _enter(self, phase: Phase, action: Action) -> list[Action]:
        self.phase = phase
        return [action]

    def _finish(self, outcome: Outcome) -> list[Action]:
        self.phase, self.outcome = "finished", outcome
        return [Finish(outcome)]
