"""Rows on their way through an engine: each becomes requests, and their answers go to where its part is collected.

A row that breaks anything becomes an error row, and takes nobody along.

    TokenizedRows -> engine requests -> Finished -> Work.builder
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from pipeline.embedding import EmbeddedText, VectorForm
from pipeline.errors import RowError
from workers.engine.request import EmbedRequest, Finished, GenerateRequest, SamplingParams, VectorRequest
from workers.engine.stats import EngineStats
from workers.preparation import Passage, Preparation, TokenizedRows, Tokens
from workers.work import Work

MAX_LOGGED_ROWS = 20

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


class Flights:
    """The requests that are under way, used by the thread that drives the engine; others may read the counts.

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
    ) -> None:
        self._engine = engine
        self._preparation = preparation
        self._sampling = sampling
        self._form = form or VectorForm()
        self._embeds_generation = embeds_generation
        self._next_request = 0
        self._flights: dict[int, Flight] = {}
        self._num_broken = 0
        self.num_errors = 0  # rows
        self.prompt_tokens = self.completion_tokens = self.embedded_tokens = 0

    def __len__(self) -> int:
        return len(self._flights)

    def admit(self, rows: TokenizedRows) -> None:
        """Have the engine take them up."""
        work = rows.work
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

    def take(self, finished: Sequence[Finished]) -> None:
        """What a step of the engine brought to an end."""
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
        self.prompt_tokens += 0 if result.sample else result.prompt_tokens
        self.completion_tokens += completion_tokens
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
            self.embedded_tokens += result.prompt_tokens
            flight.work.builder.add_vector(flight.row, "prompt", result.vector, sample=0, prompt_tokens=None)

    def _take_vector(self, flight: Flight, result: Finished) -> None:
        del self._flights[result.request_id]
        assert result.vector is not None
        self.embedded_tokens += result.prompt_tokens
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

    def clear(self) -> None:
        """Forget what is under way: nobody waits for it any more."""
        for request_id in self._flights:
            self._engine.abort(request_id)
        self._flights.clear()

    def forget(self, revoked: Collection[tuple[int, int]]) -> None:
        """Abort what is under way for these assignments."""
        for request_id, flight in list(self._flights.items()):
            if flight.work.identity in revoked:
                self._engine.abort(request_id)
                del self._flights[request_id]

    def _fail(self, work: Work, row: int, error: RowError) -> None:
        if work.fail(row, error):
            self.num_errors += 1

    def _fail_unexpectedly(self, work: Work, row: int, error: Exception) -> None:
        self._num_broken += 1
        if self._num_broken <= MAX_LOGGED_ROWS:
            log.error("row %d broke", row, exc_info=error)
        self._fail(work, row, RowError("internal", f"{type(error).__name__}: {error}"))
