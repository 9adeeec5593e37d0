"""Many requests through one decoder: `add` them, `step` until they are finished.

A step is: schedule (pure), run the decoder, choose tokens, see what ended. Between steps everything is consistent, so
requests may come and go at any time. If a step raises while it computes, nothing of it is kept and all running requests
start over; if it raises after that (an interrupt, say), the engine is left empty.

    text or ids -> GenerateRequest -> Scheduler -> StepBatch -> Runner -> hidden [T, C] -> logits [N, V] -> choose
                -> tokens -> Ending -> Finished
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from pipeline.embedding import EmbeddedText, TextForm, VectorForm
from pipeline.errors import RowError
from pipeline.model_path import resolve_model
from pipeline.tokenizer import Tokenizer
from workers.decoder.attention_choice import with_attention
from workers.decoder.attention_rules import AttentionRule
from workers.decoder.checkpoint import load_checkpoint
from workers.decoder.model import Decoder
from workers.engine import offline
from workers.engine.answer import Answer, failed
from workers.engine.block_tables import BlockTables
from workers.engine.endings import Ending, Endings, read_vocabulary
from workers.engine.kv_cache import CacheShape, GroupNeed, KVCache, auto_budget_bytes, split_budget
from workers.engine.request import EmbedRequest, Finished, GenerateRequest, Output, Request, SamplingParams
from workers.engine.runner import Runner
from workers.engine.sampler import Choices, choose
from workers.engine.scheduler import Scheduler, StepBatch
from workers.engine.sequence import Sequence
from workers.engine.stats import EngineStats
from workers.engine.vectors import Vectors
from workers.parallel.dispatch import Dispatcher

Auto = Literal["auto"]

# Chosen for a CPU. Reading the weights once a step costs as much as the arithmetic of some tens of tokens, so a step
# should hold many; beyond some hundreds nothing is gained, while the activations outgrow the cache and every decoding
# sequence waits longer for its next token. Twice as many tokens as sequences leave room to prefill while all decode.
STEP_TOKENS = 512
MAX_SEQUENCES = 256
BLOCK_TOKENS = 16


class Engine:
    """One decoder shard serving many requests at once.

    `kv_cache_bytes` bounds the cache of keys and values (kv_cache.py says how it is split, and what `auto` is where
    `sharers` engines share a machine); `max_context` is the most tokens of prompt and generation together, at most the
    model's own. A step computes up to `step_tokens` tokens of up to `max_sequences` sequences. An engine that has a
    tokenizer takes and gives text.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        eos_ids: frozenset[int] | None = None,
        kv_cache_bytes: int | Auto = "auto",
        max_context: int | Auto = "auto",
        step_tokens: int | Auto = "auto",
        max_sequences: int | Auto = "auto",
        block_tokens: int = BLOCK_TOKENS,
        reuse_prefixes: bool = True,
        sharers: int = 1,
    ) -> None:
        """`eos_ids`, the tokens that end a text, are the tokenizer's unless given. ValueError for a size of nothing."""
        for name, value in (
            ("max_context", max_context),
            ("step_tokens", step_tokens),
            ("max_sequences", max_sequences),
        ):
            if value != "auto" and value < 1:
                raise ValueError(f"{name} must be at least 1 or 'auto', got {value}")
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.max_context = decoder.config.max_context if max_context == "auto" else max_context
        self.max_context = min(self.max_context, decoder.config.max_context)
        tokens = STEP_TOKENS if step_tokens == "auto" else step_tokens
        # More sequences than tokens in a step could only wait in turns, holding their blocks.
        sequences = min(tokens, MAX_SEQUENCES if max_sequences == "auto" else max_sequences)
        self._shape = shape = CacheShape(
            block_tokens=block_tokens, step_tokens=tokens, max_context=self.max_context, max_sequences=sequences
        )
        self._reuse_prefixes = reuse_prefixes
        needs = [
            GroupNeed(block_bytes=decoder.block_bytes(g, block_tokens), reads=group.spec.reads)
            for g, group in enumerate(decoder.groups)
        ]
        budget = (
            auto_budget_bytes(needs, shape, decoder.device, sharers) if kv_cache_bytes == "auto" else kv_cache_bytes
        )
        self.cache = KVCache(decoder, split_budget(needs, budget, shape), block_tokens)
        self._runner = Runner(decoder, self.cache)
        if eos_ids is None:
            eos_ids = tokenizer.eos_ids if tokenizer is not None else frozenset()
        self._endings = Endings(tokenizer, eos_ids)
        self._stats = EngineStats()
        self._answers: dict[int, Answer]
        self._refused: list[Finished]  # not reported yet
        self._start_empty()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        kv_cache_bytes: int | Auto = "auto",
        max_context: int | Auto = "auto",
        step_tokens: int | Auto = "auto",
        max_sequences: int | Auto = "auto",
        block_tokens: int = BLOCK_TOKENS,
        reuse_prefixes: bool = True,
        sharers: int = 1,
        experts: Items[Items[int]] | None = None,
        dispatcher: Dispatcher | None = None,
        attention: Items[AttentionRule | Mapping[str, Any]] = (),
    ) -> Engine:
        """Load what `model:` may be in a job; it may lack a tokenizer. `experts`, `dispatcher`: see `Decoder.load`.

        `attention` is as in a job file: rules that give layers other patterns than the model's own.
        """
        found = resolve_model(str(path))
        checkpoint = load_checkpoint(found)
        if attention:
            checkpoint = with_attention(checkpoint, attention)
        context = None if max_context == "auto" else max_context
        decoder = Decoder.load(
            checkpoint, device=device, dtype=dtype, experts=experts, dispatcher=dispatcher, max_context=context
        )
        tokenizer, eos_ids = read_vocabulary(found)
        return cls(
            decoder,
            tokenizer,
            eos_ids=eos_ids,
            kv_cache_bytes=kv_cache_bytes,
            max_context=max_context,
            step_tokens=step_tokens,
            max_sequences=max_sequences,
            block_tokens=block_tokens,
            reuse_prefixes=reuse_prefixes,
            sharers=sharers,
        )

    def add(self, request: Request) -> None:
        """Take a request; `step` answers it, also if it can't be served.

        ValueError for what is wrong with the call rather than with the row: an id that is in use already, stop strings
        without a tokenizer, a vector that the model does not have, or a text to continue where it only embeds.
        """
        if request.request_id in self._answers:
            raise ValueError(f"request_id {request.request_id} is in use")
        ending = self._ending(request.params) if isinstance(request, GenerateRequest) else None
        if request.vector is not None:
            request.vector.form.width(self.decoder.hidden_width, self.decoder.router_width)
        error = self._scheduler.refuse(request) or self._strange_token(request.token_ids)
        if error is not None:
            self._refused.append(failed(request, error))
            return
        self._answers[request.request_id] = Answer(
            request=request,
            first=self._scheduler.add(request),
            ending=ending,
            tokenizer=self.tokenizer,
            num_samples=request.params.n if isinstance(request, GenerateRequest) else 1,
        )

    def check(self, params: SamplingParams) -> None:
        """ValueError if this engine can't follow `params`: stop strings without a tokenizer, or a model that embeds."""
        self._ending(params)

    def _ending(self, params: SamplingParams) -> Ending:
        if not self.decoder.config.has_output:
            raise ValueError("the model has no output matrix to generate with; its files hold the base model alone")
        return self._endings.of(params)

    def abort(self, request_id: int) -> None:
        """Forget a request; it gets no answer. Unknown ids (it may have finished just now) are no error."""
        answer = self._answers.pop(request_id, None)
        if answer is not None:
            self._scheduler.abort(answer.first)
            self._vectors.forget(answer.first)
        self._refused = [finished for finished in self._refused if finished.request_id != request_id]

    def withdraw(self, count: int) -> list[Request]:
        """Forget up to `count` requests that have not begun, those that came last, and give them to the caller."""
        requests = self._scheduler.withdraw(count)
        for request in requests:
            del self._answers[request.request_id]
        return requests

    @property
    def has_work(self) -> bool:
        return bool(self._refused) or self._scheduler.has_work

    @property
    def num_waiting(self) -> int:
        """Samples that don't run yet, and refused requests that the next step reports."""
        return self._scheduler.num_waiting + len(self._refused)

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def stats(self) -> EngineStats:
        """A copy: it stays as it is while the engine goes on."""
        return replace(self._stats)

    @property
    def is_idle(self) -> bool:
        return not self.has_work

    def clear_stats(self) -> None:
        """Count from here on, what experts do too."""
        self._stats = EngineStats()
        self.decoder.dispatcher.clear()

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Compute one step and return what finished in it. Without work it still joins its gang's exchanges."""
        stats = self._stats
        begin = perf_counter()
        try:
            batch = self._scheduler.schedule()
            scheduled = perf_counter()
            hidden, routing = self._runner.hidden(batch)
            vectors = self._vectors.take(hidden, routing, batch)
            logits, rows = self._runner.logits(hidden, batch)
            computed = perf_counter()
            choices = choose(logits, batch.draws, rows)
        except BaseException:
            self._scheduler.roll_back()
            raise
        try:
            sampled = perf_counter()
            self._take_vectors(vectors)
            over = self._take(batch, choices)
            self._scheduler.advance(batch)
            finished, self._refused = self._refused, []
            for sequence in over:
                finished += self._end(sequence)
            for sequence, vector in vectors:
                if isinstance(sequence.request, EmbedRequest):
                    finished.append(self._answer_vector(sequence, vector))
            ended = perf_counter()
        except BaseException:
            self._start_empty()
            raise

        stats.steps += 1
        stats.requests += len({answer.request_id for answer in finished})
        stats.errors += sum(answer.error is not None for answer in finished)
        stats.prefill_tokens += batch.num_prefill_tokens
        stats.decode_tokens += len(batch.draws)
        stats.found_tokens += batch.num_found_tokens
        stats.preemptions += batch.num_preempted
        stats.schedule_s += scheduled - begin
        if batch.num_prefill_tokens:
            stats.prefill_s += computed - scheduled
        else:
            stats.decode_s += computed - scheduled
            stats.decode_tokens_alone += len(batch.draws)
        stats.sample_s += sampled - computed
        stats.finish_s += ended - sampled
        return finished

    def generate(
        self,
        prompts: Items[str | Items[int]],
        params: SamplingParams | Items[SamplingParams] | None = None,
        *,
        keys: Items[int] | None = None,
    ) -> list[Output]:
        """Continue every prompt (text or token ids): the outputs in the order of prompts, then samples.

        `params` are one for all (default: SamplingParams()) or one a prompt. `keys` tell the prompts' random numbers
        apart; by default a prompt's key is a hash of its token ids and of how often it came before in this call, so
        that its text does not depend on its neighbours. Prompts that can't be served have one output with an `error`.
        Millions of prompts are tokenized and added as the engine goes along; only the outputs are kept.
        """
        return offline.generate(self, prompts, params, keys)

    def embed(
        self,
        texts: Items[str | Items[int] | EmbeddedText],
        pooling: str = "mean",
        *,
        dimensions: int | None = None,
        prompt: str = "",
        include_prompt: bool = True,
        echo: bool = False,
        routing_weight: float = 0.0,
    ) -> npt.NDArray[np.float32]:
        """Vectors of unit length, float32 [n, d], of texts (or token ids). ValueError naming a text that has none.

        `prompt` is put before each text, and pooled with it if `include_prompt`; with `echo` the text is read twice and
        pooled over the second time. Token ids are taken as they are. VectorForm says what the other settings mean.
        """
        vector = VectorForm(pooling=pooling, dimensions=dimensions, routing_weight=routing_weight)
        return offline.embed(self, texts, vector, TextForm(prompt=prompt, include_prompt=include_prompt, echo=echo))

    def _start_empty(self) -> None:
        """Hold no request, and nothing in the cache."""
        shape = self._shape
        tables = BlockTables(
            self.cache.groups,
            block_tokens=shape.block_tokens,
            step_tokens=shape.step_tokens,
            reuse_prefixes=self._reuse_prefixes,
        )
        self._scheduler = Scheduler(
            tables,
            step_tokens=shape.step_tokens,
            max_sequences=shape.max_sequences,
            max_context=shape.max_context,
        )
        self._vectors = Vectors()
        self._answers = {}
        self._refused = []

    def _take_vectors(self, vectors: Items[tuple[Sequence, npt.NDArray[np.float32] | RowError]]) -> None:
        """Note which prompts' vectors are whole; a generation goes on, unless its vector is none."""
        for sequence, vector in vectors:
            sequence.awaits_vector = False
            if isinstance(sequence.request, EmbedRequest):
                sequence.ended_by = "vector"
            elif isinstance(vector, RowError):
                self._answers[sequence.request.request_id].error = vector
            else:
                self._answers[sequence.request.request_id].vector = vector

    def _take(self, batch: StepBatch, choices: Choices) -> list[Sequence]:
        """Give each draw its token -> the sequences that are over."""
        return [
            sequence
            for i, (sequence, token) in enumerate(zip(batch.draws, choices.token_ids, strict=True))
            if self._answers[sequence.request.request_id].take(
                sequence, token, choices.logprobs.get(i), choices.errors.get(i)
            )
        ]

    def _end(self, sequence: Sequence) -> list[Finished]:
        """Note that a sample is over -> the answer to its request, if that was the last one or it failed."""
        request = sequence.request
        answer = self._answers.get(request.request_id)
        if answer is None:  # another sample of the request failed in this same step
            return []
        if answer.error is not None:
            self.abort(request.request_id)
            return [failed(request, answer.error)]
        finished = answer.end(sequence)
        if finished:
            del self._answers[request.request_id]
        return finished

    def _answer_vector(self, sequence: Sequence, vector: npt.NDArray[np.float32] | RowError) -> Finished:
        del self._answers[sequence.request.request_id]
        if isinstance(vector, RowError):
            return failed(sequence.request, vector)
        return Finished(
            request_id=sequence.request.request_id, token_ids=[], prompt_tokens=sequence.num_prompt, vector=vector
        )

    def _strange_token(self, token_ids: Items[int]) -> RowError | None:
        vocabulary = self.decoder.vocab_size
        if min(token_ids) >= 0 and max(token_ids) < vocabulary:
            return None
        strange = next(token for token in token_ids if not 0 <= token < vocabulary)
        return RowError("internal", f"token id {strange} is outside the model's vocabulary of {vocabulary}")
