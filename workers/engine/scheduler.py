"""Which tokens of which sequences the next step computes. Pure: no torch, no clock, no I/O.

A pass serves the running sequences, oldest first, then admits waiting ones, oldest first, until the step's token budget
is spent. Prompts longer than what is left of the budget go on in the next step (chunked prefill), so that decoding
sequences, which are older, don't wait for a long prompt. When a running sequence needs a block and none is free, the
youngest running sequence gives all of its blocks back and is computed again later (preemption by recomputation; what it
wrote stays findable as a prefix until the blocks are taken).

Why everything ends: the oldest running sequence is served first in every pass and may take every other one's blocks, a
request that could not fit the empty cache is refused when it is added, and a sequence that was served in a pass is not
preempted in it. Why nobody starves: nothing is admitted before what arrived earlier.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from pipeline.errors import RowError
from workers.engine.block_tables import BlockTables
from workers.engine.request import EmbedRequest, GenerateRequest
from workers.engine.sequence import Phase, Sequence


@dataclass(slots=True, kw_only=True)
class StepBatch:
    """One step's work as plain data: T tokens of S sequences, packed in the order of `sequences`; G layer groups.

    A draw is a token to be chosen: `draws[i]` gets its next token from the last hidden state of
    `sequences[draw_rows[i]]` (several samples of one prompt draw from the same row when the prompt is done). `copies`
    are made first, then all keys and values of the step are written, then read: a table may name a block that another
    sequence fills in this step.
    """

    token_ids: list[int]  # [T]
    starts: list[int]  # [S] the position of each sequence's first token of this step
    counts: list[int]  # [S] tokens of each sequence in this step, at least 1
    block_tables: list[list[array[int]]]  # [G][S] block of position p is table[p // block_tokens]; -1: never read again
    copies: list[list[tuple[int, int]]]  # [G] (source, target)
    sequences: list[Sequence]  # [S]
    draws: list[Sequence] = field(default_factory=list)
    draw_rows: list[int] = field(default_factory=list)
    pooled_rows: list[int] = field(default_factory=list)  # of S: sequences that take the hidden states of their prompts
    num_prefill_tokens: int = 0  # of T: prompt tokens, and generated ones computed again
    num_found_tokens: int = 0  # positions that admitted sequences found by their prefix
    num_preempted: int = 0


class Scheduler:
    """Holds every sequence from `add` until it ended.

    The cycle: `schedule()` a batch; compute it; append each draw's token and set `ended_by` on sequences that are over;
    `advance(batch)`. If the computing failed, `roll_back()` instead: all start over with an empty cache.
    """

    def __init__(self, tables: BlockTables, *, step_tokens: int, max_sequences: int, max_context: int) -> None:
        if step_tokens < 1 or max_sequences < 1 or max_context < 1:
            raise ValueError(
                "step_tokens, max_sequences and max_context must be at least 1, "
                f"got {step_tokens}, {max_sequences} and {max_context}"
            )
        self.tables = tables
        self.step_tokens = step_tokens
        self.max_sequences = max_sequences
        self.max_context = max_context
        self._arrivals = 0
        self._waiting: deque[Sequence] = deque()  # not started yet, in order of arrival
        self._num_waiting = 0  # without those that were aborted while in _waiting
        self._resuming: list[Sequence] = []  # preempted, and later samples; sorted by order, all older than _waiting
        self._running: list[Sequence] = []  # sorted by order
        self._pending: StepBatch | None = None  # scheduled, not yet advanced

    @property
    def num_waiting(self) -> int:
        return self._num_waiting + len(self._resuming)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._resuming or self._num_waiting)

    def refuse(self, request: GenerateRequest | EmbedRequest) -> RowError | None:
        """Why `request` can't be served at all; None if it can."""
        num_prompt = len(request.token_ids)
        if num_prompt == 0:
            return RowError("empty_prompt", "the prompt has no tokens")
        generates = isinstance(request, GenerateRequest)
        if num_prompt > self.max_context - (1 if generates else 0):
            room = ", which leaves no room to generate" if num_prompt == self.max_context else ""
            return RowError(
                "prompt_too_long", f"the prompt has {num_prompt} tokens; the context holds {self.max_context}{room}"
            )
        cached = self._max_tokens(request) - (1 if generates else 0)  # the last token is never read again
        if not self.tables.could_ever_hold(cached):
            new = f" and up to {request.params.max_new_tokens} new ones" if isinstance(request, GenerateRequest) else ""
            return RowError(
                "request_too_large",
                f"{num_prompt} prompt tokens{new} need room for {cached} in the KV cache, which holds "
                f"{self.tables.most_tokens()}; raise engine.kv_cache_bytes{' or lower max_new_tokens' if new else ''}",
            )
        return None

    def add(self, request: GenerateRequest | EmbedRequest) -> Sequence:
        """Queue a request that `refuse` has nothing against. -> its first sample, by which to abort it."""
        # What is pooled has to be computed, all of it but for the last token's.
        most_reused = len(request.token_ids)
        if request.vector is not None and request.vector.form.pooling != "last":
            most_reused = request.vector.pooled_from
        sequence = Sequence(
            request=request,
            order=(self._arrivals, 0),
            tokens=array("q", request.token_ids),
            num_prompt=len(request.token_ids),
            max_tokens=self._max_tokens(request),
            tables=self.tables.new_tables(),
            first_kept=[0] * len(self.tables.groups),
            # Blocks that nobody will look for are not kept.
            reuses_prefix=isinstance(request, GenerateRequest) or most_reused > 0,
            most_reused=most_reused,
            takes_argmax=isinstance(request, GenerateRequest) and request.takes_argmax,
            siblings_to_come=request.params.n - 1 if isinstance(request, GenerateRequest) else 0,
            awaits_vector=request.vector is not None,
        )
        self._arrivals += 1
        self._waiting.append(sequence)
        self._num_waiting += 1
        return sequence

    def abort(self, first: Sequence) -> None:
        """End every sample of the request whose first sample is `first`."""
        arrival = first.order[0]
        for sequence in (s for s in (*self._running, *self._resuming) if s.order[0] == arrival):
            self._end(sequence)
        self._running = [s for s in self._running if s.phase is not Phase.ENDED]
        self._resuming = [s for s in self._resuming if s.phase is not Phase.ENDED]
        if first.phase is Phase.WAITING:  # still in _waiting: it is passed over when its turn comes
            self._num_waiting -= 1
            self._end(first)
        first.siblings_to_come = 0

    def withdraw(self, count: int) -> list[GenerateRequest | EmbedRequest]:
        """Give up to `count` requests back of which nothing has been computed, those that came last first."""
        given: list[GenerateRequest | EmbedRequest] = []
        while self._waiting and len(given) < count:
            sequence = self._waiting.pop()
            if sequence.phase is Phase.WAITING:
                self._num_waiting -= 1
                self._end(sequence)
                given.append(sequence.request)
        return given

    def schedule(self) -> StepBatch:
        """The next step's batch; empty when there is nothing to do."""
        groups = range(len(self.tables.groups))
        batch = StepBatch(
            token_ids=[],
            starts=[],
            counts=[],
            block_tables=[[] for _ in groups],
            copies=[[] for _ in groups],
            sequences=[],
        )
        self._pending = batch
        self._go_on(batch)
        if not batch.num_preempted:
            self._admit(batch)
        return batch

    def advance(self, batch: StepBatch) -> None:
        """Take note that `batch` was computed, its draws have their tokens, and some of its sequences ended."""
        assert batch is self._pending
        self._pending = None
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            sequence.num_computed += count
            sequence.settled = True
        ended = False
        for sequence in batch.sequences:
            if sequence.ended_by is not None:
                self._end(sequence)
                ended = True
        if ended:
            self._running = [s for s in self._running if s.phase is not Phase.ENDED]
        for sequence in batch.draws:
            if sequence.phase is Phase.WAITING:  # a later sample that has its first token now, but no blocks yet
                if sequence.ended_by is None:
                    insort(self._resuming, sequence, key=_order)
                else:
                    sequence.phase = Phase.ENDED

    def roll_back(self) -> None:
        """The batch scheduled last was not computed, and no draw got a token: trust nothing in the cache, start over.

        Later samples that would have drawn from the batch go on by themselves.
        """
        for sequence in self._pending.draws if self._pending is not None else ():
            if sequence.phase is Phase.WAITING and sequence.elder is not None and sequence not in self._resuming:
                insort(self._resuming, sequence, key=_order)
        self._pending = None
        while self._running:
            self._preempt(self._running.pop())
        self.tables.forget_all()

    def _max_tokens(self, request: GenerateRequest | EmbedRequest) -> int:
        if isinstance(request, EmbedRequest):
            return len(request.token_ids)
        return min(len(request.token_ids) + request.params.max_new_tokens, self.max_context)

    def _go_on(self, batch: StepBatch) -> None:
        running, budget, index = self._running, self.step_tokens, 0
        block_tokens = self.tables.block_tokens
        while index < len(running) and budget > 0:
            sequence = running[index]
            start = sequence.num_computed
            count = min(len(sequence.tokens) - start, budget)
            # A single token short of a block's border goes into a block that is there: most of all decoding.
            while not (count == 1 and start % block_tokens) and not self.tables.extend(sequence, start + count):
                victim = running.pop()
                self._preempt(victim)
                batch.num_preempted += 1
                if victim is sequence:
                    assert index > 0, "a sequence alone in the cache always fits: `refuse` saw to it"
                    return
            self._put(batch, sequence, count)
            budget -= count
            index += 1

    def _admit(self, batch: StepBatch) -> None:
        budget = self.step_tokens - len(batch.token_ids)
        while budget > 0 and len(self._running) < self.max_sequences:
            sequence = self._oldest_waiting()
            if sequence is None:
                return
            # A block left free for each that then runs, so that a newcomer isn't thrown out again a few steps later.
            reserve = len(self._running) + 1 if self._running else 0
            copies = self.tables.fork(sequence, reserve)
            if copies is None and not self.tables.admit(sequence, reserve):
                return
            start = sequence.num_computed
            count = min(len(sequence.tokens) - start, budget)
            extended = self.tables.extend(sequence, start + count)
            assert extended, "`admit` saw that there are blocks for all of it"
            if self._resuming:
                self._resuming.pop(0)
            else:
                self._waiting.popleft()
                self._num_waiting -= 1
            sequence.phase = Phase.RUNNING
            insort(self._running, sequence, key=_order)
            if copies is None:
                batch.num_found_tokens += start
            else:
                for group, pairs in enumerate(copies):
                    batch.copies[group].extend(pairs)
            self._put(batch, sequence, count)
            budget -= count

    def _oldest_waiting(self) -> Sequence | None:
        if self._resuming:
            return self._resuming[0]
        while self._waiting and self._waiting[0].phase is Phase.ENDED:
            self._waiting.popleft()
        return self._waiting[0] if self._waiting else None

    def _put(self, batch: StepBatch, sequence: Sequence, count: int) -> None:
        start, tokens = sequence.num_computed, sequence.tokens
        end = start + count
        done = end == len(tokens)
        batch.starts.append(start)
        batch.counts.append(count)
        for tables, table in zip(batch.block_tables, sequence.tables, strict=True):
            tables.append(table)
        batch.sequences.append(sequence)
        if count == 1:
            batch.token_ids.append(tokens[start])
        else:
            batch.token_ids.extend(tokens[start:end])
        if count > 1 or end % self.tables.block_tokens == 0:
            self.tables.publish(sequence, start, end)
        decodes = done and end > sequence.num_prompt
        batch.num_prefill_tokens += count - 1 if decodes else count
        row = len(batch.sequences) - 1
        if sequence.awaits_vector:
            batch.pooled_rows.append(row)
        if done and isinstance(sequence.request, GenerateRequest):
            batch.draws.append(sequence)
            batch.draw_rows.append(row)
            if sequence.siblings_to_come:
                siblings = self._siblings(sequence)
                batch.draws.extend(siblings)
                batch.draw_rows.extend([row] * len(siblings))

    def _siblings(self, first: Sequence) -> list[Sequence]:
        """The later samples of a request whose prompt is done in this step: they draw now and are queued after it."""
        siblings = [
            Sequence(
                request=first.request,
                order=(first.order[0], sample),
                tokens=first.tokens[:],
                num_prompt=first.num_prompt,
                max_tokens=first.max_tokens,
                tables=self.tables.new_tables(),
                first_kept=[0] * len(self.tables.groups),
                reuses_prefix=True,
                takes_argmax=first.takes_argmax,
                elder=first,
            )
            for sample in range(1, 1 + first.siblings_to_come)
        ]
        first.siblings_to_come = 0
        return siblings

    def _preempt(self, sequence: Sequence) -> None:
        self.tables.release(sequence)
        sequence.phase = Phase.WAITING
        insort(self._resuming, sequence, key=_order)

    def _end(self, sequence: Sequence) -> None:
        self.tables.release(sequence)
        sequence.phase = Phase.ENDED
        sequence.elder = None


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
