"""A shard: one decoder, the rows that run through it, and the parts that come of them.

Three threads, each waiting for nobody while it has work: one reads and tokenizes the next splits (`read_ahead.py`), one
drives the engine (`Shard.run`), one writes finished parts. Sequences of several splits run together, so the engine
does not wait at a split's end. Nothing here knows Ray; `shard_actor.py` wraps it.

    Assignment -> TokenizedRows -> engine requests -> Finished -> Work.builder -> attempt -> ShardReport
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from typing import NamedTuple, Protocol

from pipeline.embedding import EmbeddedText, VectorForm
from pipeline.errors import JobError, RowError, UserError
from workers.assignment import Assignment, Counts, Failure, FinishedAssignment, ShardReport
from workers.engine.request import EmbedRequest, Finished, GenerateRequest, SamplingParams, VectorRequest
from workers.engine.stats import EngineStats
from workers.parallel.expert_work import ExpertWork
from workers.preparation import Passage, Preparation, TokenizedRows, Tokens
from workers.read_ahead import ReadAhead
from workers.work import Work

MAX_UNREAD = 2  # assignments leased ahead of the one that is being read
MAX_READY_TOKENS = 1 << 21
MAX_PARTS_IN_WRITING = 2  # beyond these the engine waits for the disk
IDLE_S = 0.05
GANG_IDLE_S = 0.005  # the others can't begin before this rank has looked whether it has rows
MAX_LOGGED_ROWS = 20
EXPERTS_TOLD_S = 2.0  # between two reports that say what experts did: a number a layer and expert

log = logging.getLogger(__name__)


class ShardEngine(Protocol):
    """What a shard needs of its engine; `workers.engine.Engine` is one."""

    @property
    def has_work(self) -> bool: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def stats(self) -> EngineStats: ...
    def add(self, request: GenerateRequest | EmbedRequest) -> None: ...
    def step(self) -> Sequence[Finished]: ...
    def abort(self, request_id: int) -> None: ...
    @property
    def is_idle(self) -> bool:
        """Whether nothing is left of any request, in a gang also nothing that was lent or borrowed."""

    def clear_stats(self) -> None: ...


class LockStep(Protocol):
    """What a shard in a gang needs besides; `gang_engine.GangEngine` is one.

    With it `has_work` says whether the gang steps, as it was agreed: then each rank must, also without requests.
    """

    def agree(self, *, stopping: bool) -> bool: ...


class Kind(Enum):
    GENERATION = 0
    PROMPT_VECTOR = 1
    GENERATION_VECTOR = 2


class Flight(NamedTuple):
    """What a request of the engine is for. `sample` is that of the generation which is embedded."""

    work: Work
    row: int
    kind: Kind
    sample: int


class RowRunner:
    """Runs assignments through an engine.

    `grant`, `revoke`, `stop` and `report` may be called from any thread; `run` is called once, and returns after `stop`
    or when the shard fails. A row that breaks anything becomes an error row. A step of the engine that raises ends the
    shard, since nobody can say whose fault it was: the controller then narrows it down.

    `sampling` None: nothing is generated. `form` None: nothing is embedded. A prompt that is the passage too is read
    once: the request that continues it asks for its vector.
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
        """`batch_rows`: so many requests are kept waiting at the engine, and as many rows are tokenized ahead.

        `lock_step`: the engine itself, where it is one rank's of a gang. `expert_work`: what to report of experts.
        """
        self._engine = engine
        self._preparation = preparation
        self._sampling = sampling
        self._form = form or VectorForm()
        self._embeds_generation = embeds_generation
        self._batch_rows = batch_rows
        self._lock_step = lock_step
        self._expert_work = expert_work
        self._experts_told_at = float("-inf")
        self._idle_s = IDLE_S if lock_step is None else GANG_IDLE_S
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="parts")
        self._writing: deque[tuple[Work, Future[FinishedAssignment]]] = deque()

        self._changed = threading.Condition()  # guards what several threads use: down to `_stopped`
        self._received = 0
        self._told_wanted = 0
        self._news = False
        self._revoked: list[tuple[int, int]] = []
        self._finished: list[FinishedAssignment] = []
        self._failure: Failure | None = None
        self._stopping = self._stopped = False

        self._next_request = 0
        self._flights: dict[int, Flight] = {}
        self._open: list[Work] = []  # whose rows have begun to come, not yet being written
        self._num_broken = self._num_errors = self._prompt_tokens = self._completion_tokens = self._embedded_tokens = 0
        self._first_step_at: float | None = None
        self._ahead = ReadAhead(
            preparation.read,
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
        unreported = [*self._open, *(work for work, _ in self._writing)]
        return Counts(
            unreported_rows=sum(work.num_done for work in unreported),
            error_rows=self._num_errors,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            embedded_tokens=self._embedded_tokens,
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
        for request_id in self._flights:  # rows that nobody waits for any more
            self._engine.abort(request_id)
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
            self._take(finished)
        self._hand_over()

    def _feed(self) -> None:
        """Keep a full batch waiting at the engine; where it has nothing to do, wait a little for rows."""
        while self._engine.num_waiting < self._batch_rows:
            rows = self._ahead.take(0.0 if self._engine.has_work else self._idle_s)
            if rows is None:
                return
            self._admit(rows)

    def _admit(self, rows: TokenizedRows) -> None:
        work = rows.work
        if work not in self._open:
            self._open.append(work)
        work.carry(rows.first_row, rows.batch)
        prompts: Sequence[Tokens | None] = rows.prompts or [None] * len(rows.rows)
        passages: Sequence[Passage | None] = rows.passages or [None] * len(rows.rows)
        for row, prompt, passage in zip(rows.rows, prompts, passages, strict=True):
            if isinstance(prompt, RowError):
                self._fail(work, row, prompt)
            elif isinstance(passage, RowError):
                self._fail(work, row, passage)
            else:
                try:
                    if prompt is not None and passage is not None and prompt == passage.ids:
                        self._generate(
                            work, row, prompt, VectorRequest(form=self._form, pooled_from=passage.pooled_from)
                        )
                        continue
                    if prompt is not None:
                        self._generate(work, row, prompt)
                    if passage is not None:
                        self._embed(work, row, Kind.PROMPT_VECTOR, 0, passage)
                except Exception as error:
                    self._fail_unexpectedly(work, row, error)

    def _generate(self, work: Work, row: int, tokens: list[int], vector: VectorRequest | None = None) -> None:
        assert self._sampling is not None
        request_id = self._next_request
        self._next_request += 1
        self._engine.add(
            GenerateRequest(request_id=request_id, token_ids=tokens, params=self._sampling, key=row, vector=vector)
        )
        self._flights[request_id] = Flight(work, row, Kind.GENERATION, 0)

    def _embed(self, work: Work, row: int, kind: Kind, sample: int, passage: EmbeddedText) -> None:
        request_id = self._next_request
        self._next_request += 1
        vector = VectorRequest(form=self._form, pooled_from=passage.pooled_from)
        self._engine.add(EmbedRequest(request_id=request_id, token_ids=passage.ids, vector=vector))
        self._flights[request_id] = Flight(work, row, kind, sample)

    def _take(self, finished: Sequence[Finished]) -> None:
        generated: list[tuple[Work, int, int, str]] = []  # to be embedded: work, row, sample, text
        for result in finished:
            flight = self._flights.get(result.request_id)
            if flight is None:
                continue
            try:
                if result.error is not None:
                    del self._flights[result.request_id]
                    self._fail(flight.work, flight.row, result.error)
                elif flight.kind is Kind.GENERATION:
                    self._take_generation(flight, result)
                    if self._embeds_generation:
                        generated.append((flight.work, flight.row, result.sample, result.text or ""))
                else:
                    self._take_vector(flight, result)
            except Exception as error:
                self._fail_unexpectedly(flight.work, flight.row, error)
        if generated:
            self._embed_generations(generated)

    def _take_generation(self, flight: Flight, result: Finished) -> None:
        assert self._sampling is not None
        if result.sample + 1 == self._sampling.n:
            del self._flights[result.request_id]
        completion_tokens = len(result.token_ids)
        self._prompt_tokens += 0 if result.sample else result.prompt_tokens
        self._completion_tokens += completion_tokens
        flight.work.builder.add(
            flight.row,
            sample=result.sample,
            text=result.text or "",
            finish_reason=result.finish_reason or "stop",
            prompt_tokens=result.prompt_tokens,
            completion_tokens=completion_tokens,
            logprobs=result.logprobs if self._sampling.logprobs else None,
        )
        if result.vector is not None:
            self._embedded_tokens += result.prompt_tokens
            flight.work.builder.add_vector(flight.row, "prompt", result.vector, sample=0, prompt_tokens=None)

    def _take_vector(self, flight: Flight, result: Finished) -> None:
        del self._flights[result.request_id]
        assert result.vector is not None
        self._embedded_tokens += result.prompt_tokens
        of_prompt = flight.kind is Kind.PROMPT_VECTOR
        flight.work.builder.add_vector(
            flight.row,
            "prompt" if of_prompt else "generation",
            result.vector,
            sample=flight.sample,
            prompt_tokens=result.prompt_tokens if self._sampling is None else None,
        )

    def _embed_generations(self, generated: Sequence[tuple[Work, int, int, str]]) -> None:
        tokenized = self._preparation.tokenize_generations([text for _, _, _, text in generated])
        for (work, row, sample, _), tokens in zip(generated, tokenized, strict=True):
            if not work.builder.needs(row):
                continue
            if isinstance(tokens, RowError):
                self._fail(work, row, tokens)
                continue
            try:
                self._embed(work, row, Kind.GENERATION_VECTOR, sample, tokens)
            except Exception as error:
                self._fail_unexpectedly(work, row, error)

    def _hand_over(self) -> None:
        """Complete works go to the writer. Raises what writing raised."""
        for work in [work for work in self._open if work.is_complete]:
            self._open.remove(work)
            future = self._writer.submit(work.write)
            self._writing.append((work, future))
            future.add_done_callback(self._written)
        while self._writing and (self._writing[0][1].done() or len(self._writing) > MAX_PARTS_IN_WRITING):
            self._writing[0][1].result()
            self._writing.popleft()

    def _written(self, future: Future[FinishedAssignment]) -> None:
        """In the writer's thread."""
        if future.exception() is None:
            with self._changed:
                self._finished.append(future.result())
                self._news = True
                self._changed.notify_all()

    def _forget_revoked(self) -> None:
        if not self._revoked:
            return
        with self._changed:
            revoked, self._revoked = set(self._revoked), []
        self._open = [work for work in self._open if work.identity not in revoked]
        for request_id, flight in list(self._flights.items()):
            if flight.work.identity in revoked:
                self._engine.abort(request_id)
                del self._flights[request_id]

    def _fail(self, work: Work, row: int, error: RowError) -> None:
        if work.fail(row, error):
            self._num_errors += 1

    def _fail_unexpectedly(self, work: Work, row: int, error: Exception) -> None:
        self._num_broken += 1
        if self._num_broken <= MAX_LOGGED_ROWS:
            log.error("row %d broke", row, exc_info=error)
        self._fail(work, row, RowError("internal", f"{type(error).__name__}: {error}"))

    def _fail_shard(self, failure: Failure) -> None:
        with self._changed:
            self._failure = failure
            self._news = True
