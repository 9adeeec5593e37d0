"""A shard: one decoder, the rows that run through it, and the parts that come of them.

Three threads, each waiting for nobody while it has work: one reads and tokenizes the next splits (`read_ahead.py`), one
drives the engine (`RowRunner.run`), one writes finished parts. Sequences of several splits run together, so the engine
does not wait at a split's end. Nothing here knows Ray; `shard.py` wraps it.

    Assignment -> TokenizedRows -> flights.py, through the engine -> Work -> attempt -> ShardReport
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from pipeline.embedding import VectorForm
from pipeline.errors import JobError, UserError
from workers.assignment import Assignment, Counts, Failure, FinishedAssignment, ShardReport
from workers.engine.request import SamplingParams
from workers.flights import Flights, ShardEngine
from workers.parallel.expert_work import ExpertWork
from workers.preparation import Preparation
from workers.read_ahead import ReadAhead
from workers.work import Work

MAX_UNREAD = 2  # assignments leased ahead of the one that is being read
MAX_READY_TOKENS = 1 << 21
MAX_PARTS_IN_WRITING = 2  # beyond these the engine waits for the disk
IDLE_S = 0.05
GANG_IDLE_S = 0.005  # the others can't begin before this rank has looked whether it has rows
EXPERTS_TOLD_S = 2.0  # between two reports that say what experts did: a number a layer and expert

log = logging.getLogger(__name__)


class LockStep(Protocol):
    """What a shard in a gang needs besides; `gang_engine.GangEngine` is one.

    With it `has_work` says whether the gang steps, as it was agreed: then each rank must, also without requests.
    """

    def agree(self, *, stopping: bool) -> bool: ...


class RowRunner:
    """Runs assignments through an engine.

    `grant`, `revoke`, `stop` and `report` may be called from any thread; `run` is called once, and returns after `stop`
    or when the shard fails. A row that breaks anything becomes an error row. A step of the engine that raises ends the
    shard, since nobody can say whose fault it was: the controller then narrows it down.
    """

    def __init__(
        self,
        engine: ShardEngine,
        preparation: Preparation,
        *,
        sampling: SamplingParams | None,
        form: VectorForm | None,
        embeds_generation: bool,
        batch_rows: int,
        lock_step: LockStep | None = None,
        expert_work: Callable[[], ExpertWork] | None = None,
    ) -> None:
        """`sampling`, `form` and `embeds_generation` are as of `flights.Flights`.

        `batch_rows`: so many requests are kept waiting at the engine, and as many rows are tokenized ahead.
        `lock_step`: the engine itself, where it is one rank's of a gang. `expert_work`: what to report of experts.
        """
        self._engine = engine
        self._preparation = preparation
        self._flights = Flights(engine, preparation, sampling=sampling, form=form, embeds_generation=embeds_generation)
        self._batch_rows = batch_rows
        self._lock_step = lock_step
        self._expert_work = expert_work
        self._experts_told_at = float("-inf")
        self._idle_s = IDLE_S if lock_step is None else GANG_IDLE_S
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="parts")
        self._writing: deque[Future[None]] = deque()

        self._changed = threading.Condition()  # guards what several threads use: down to `_stopped`
        self._unwritten: list[Work] = []  # complete, and not in `_finished` nor in an earlier report
        self._received = 0
        self._told_wanted = 0
        self._news = False
        self._revoked: list[tuple[int, int]] = []
        self._finished: list[FinishedAssignment] = []
        self._failure: Failure | None = None
        self._stopping = self._stopped = False

        self._open: list[Work] = []  # whose rows have begun to come
        self._first_step_at: float | None = None
        self._ahead = ReadAhead(
            self._preparation.read,
            max_rows=batch_rows,
            max_tokens=MAX_READY_TOKENS,
            on_begun=self._notify,
        )

    # From any thread

    def grant(self, assignments: Sequence[Assignment]) -> None:
        with self._changed:
            self._received += len(assignments)
            self._told_wanted = max(0, self._told_wanted - len(assignments))
            for assignment in assignments:
                self._ahead.put(assignment)

    def revoke(self, index: int, revision: int) -> None:
        """This assignment is not needed any more."""
        self._ahead.drop(index, revision)
        with self._changed:
            self._revoked.append((index, revision))

    def stop(self) -> None:
        """Finish the step under way and the parts that are being written, and no more."""
        self._stopping = True
        self._ahead.close()

    def report(self, timeout_s: float) -> ShardReport:
        """What there is to tell: at once where the controller has something to do about it, else after the time."""
        with self._changed:
            self._changed.wait_for(lambda: self._news or self._wanted() > self._told_wanted, timeout_s)
            self._news = False
            self._told_wanted = self._wanted()
            finished, self._finished = tuple(self._finished), []
            return ShardReport(
                phase="stopped" if self._stopped else "running",
                received=self._received,
                wanted=self._told_wanted,
                finished=finished,
                counts=self._counts(),
                failure=self._failure,
                first_step_at=self._first_step_at,
                is_free=self.is_free,
                engine=self._engine.stats.as_dict(),
                experts=self._experts(),
            )

    @property
    def is_free(self) -> bool:
        """Whether this is over and has left the engine as it was."""
        return self._stopped and self._failure is None and self._engine.is_idle

    def _experts(self) -> ExpertWork | None:
        if self._expert_work is None or (
            not self._stopped and time.monotonic() - self._experts_told_at < EXPERTS_TOLD_S
        ):
            return None
        self._experts_told_at = time.monotonic()
        return self._expert_work()

    def _wanted(self) -> int:
        return 0 if self._stopping else max(0, MAX_UNREAD - self._ahead.num_unread)

    def _counts(self) -> Counts:
        return Counts(
            unreported_rows=sum(work.num_done for work in (*self._open, *self._unwritten)),
            error_rows=self._flights.num_errors,
            prompt_tokens=self._flights.prompt_tokens,
            completion_tokens=self._flights.completion_tokens,
            embedded_tokens=self._flights.embedded_tokens,
        )

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # The thread that runs

    def run(self) -> None:
        try:
            while not self._is_over():
                self._turn()
        except UserError as error:
            self._fail_shard(Failure(kind="user", message=str(error)))
        except JobError as error:
            self._fail_shard(Failure(kind="job", message=str(error)))
        except Exception as error:
            log.exception("the shard broke")
            self._fail_shard(Failure(kind="crash", message=f"{type(error).__name__}: {error}"))
        self._ahead.close()
        self._flights.clear()
        self._writer.shutdown(wait=True)
        with self._changed:
            self._stopped = self._news = True
            self._changed.notify_all()

    def _is_over(self) -> bool:
        """Whether this shard was asked to stop; in a gang, whether any of its shards was."""
        if self._lock_step is None:
            return self._stopping
        agreed = self._lock_step.agree(stopping=self._stopping)
        if agreed:
            self._stopping = True
        return agreed  # and not `_stopping`, which may be set since: nobody leaves before the others know

    def _turn(self) -> None:
        self._forget_revoked()
        self._feed()
        if self._engine.has_work:
            finished = self._engine.step()
            if self._first_step_at is None:
                self._first_step_at = time.time()
            self._flights.take(finished)
        self._hand_over()

    def _feed(self) -> None:
        """Keep a full batch waiting at the engine; where it has nothing to do, wait a little for rows."""
        while self._engine.num_waiting < self._batch_rows:
            rows = self._ahead.take(0.0 if self._engine.has_work else self._idle_s)
            if rows is None:
                return
            if rows.work not in self._open:
                self._open.append(rows.work)
            self._flights.admit(rows)

    def _hand_over(self) -> None:
        """Complete works go to the writer. Raises what writing raised."""
        for work in [work for work in self._open if work.is_complete]:
            with self._changed:
                self._open.remove(work)
                self._unwritten.append(work)
            self._writing.append(self._writer.submit(self._write, work))
        while self._writing and (self._writing[0].done() or len(self._writing) > MAX_PARTS_IN_WRITING):
            self._writing.popleft().result()

    def _write(self, work: Work) -> None:
        """In the writer's thread."""
        finished = work.write()
        with self._changed:
            self._unwritten.remove(work)
            self._finished.append(finished)
            self._news = True
            self._changed.notify_all()

    def _forget_revoked(self) -> None:
        if not self._revoked:
            return
        with self._changed:
            revoked, self._revoked = set(self._revoked), []
        self._open = [work for work in self._open if work.identity not in revoked]
        self._flights.forget(revoked)

    def _fail_shard(self, failure: Failure) -> None:
        with self._changed:
            self._failure = failure
            self._news = True
