"""A scheduler with a cache that remembers what was written where, so that any wrongly shared block shows."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

from pipeline.embedding import VectorForm
from pipeline.errors import RowError
from workers.decoder.patterns import Reads
from workers.engine.block_tables import BlockTables, GroupCache
from workers.engine.blocks import ROOT, chain
from workers.engine.request import EmbedRequest, GenerateRequest, SamplingParams, VectorRequest
from workers.engine.scheduler import Scheduler, StepBatch
from workers.engine.sequence import Sequence

STOP_TOKEN = 0


def checksum(tokens: Iterable[int]) -> int:
    return zlib.crc32(bytes(list(tokens)))


def next_token(tokens: Iterable[int], sample: int) -> int:
    """What the simulated model says comes next: a function of the whole text and the sample."""
    return checksum([*tokens, sample]) % 7


def alone(prompt: list[int], sample: int, max_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < max_tokens:
        tokens.append(next_token(tokens, sample))
        if tokens[-1] == STOP_TOKEN:
            break
    return tokens[len(prompt) :]


def read_by(reads: Reads, start: int, end: int) -> set[int]:
    """Positions that queries start..end-1 read, a query at a time."""
    read: set[int] = set()
    for query in range(start, end):
        for key in range(query + 1):
            near = reads.everything
            if reads.window is not None:
                near = key > query - reads.window
            if reads.block is not None:
                near = key // reads.block == query // reads.block
            if near or (reads.period is not None and reads.summary[0] <= key % reads.period < reads.summary[1]):
                read.add(key)
    return read


class SimulatedRun:
    """A scheduler, and a model whose cached key at position p is (p, checksum of the tokens up to p)."""

    def __init__(self, groups: tuple[GroupCache, ...], *, block_tokens: int = 4, **scheduling: Any) -> None:
        scheduling = {"step_tokens": 16, "max_sequences": 8, "max_context": 64} | scheduling
        reuse = scheduling.pop("reuse_prefixes", True)
        self.tables = BlockTables(
            groups, block_tokens=block_tokens, step_tokens=scheduling["step_tokens"], reuse_prefixes=reuse
        )
        self.scheduler = Scheduler(self.tables, **scheduling)
        self.cells: list[dict[int, tuple[int, int]]] = [{} for _ in groups]
        self.finished: dict[tuple[int, int], list[int]] = {}
        self.computed_tokens = 0
        self.preempted = 0
        self.found_tokens = 0

    def add(
        self, request_id: int, prompt: list[int], max_new_tokens: int = 8, n: int = 1, embed: str | None = None
    ) -> Sequence | RowError:
        request: GenerateRequest | EmbedRequest
        if embed is not None:
            request = EmbedRequest(
                request_id=request_id, token_ids=prompt, vector=VectorRequest(form=VectorForm(pooling=embed))
            )
        else:
            params = SamplingParams(max_new_tokens=max_new_tokens, n=n)
            request = GenerateRequest(request_id=request_id, token_ids=prompt, params=params)
        return self.scheduler.refuse(request) or self.scheduler.add(request)

    def step(self) -> StepBatch:
        batch = self.scheduler.schedule()
        self._compute(batch)
        for sequence in batch.draws:
            sequence.tokens.append(next_token(sequence.tokens, sequence.sample))
            if sequence.tokens[-1] == STOP_TOKEN:
                sequence.ended_by = "stop"
            elif len(sequence.tokens) == sequence.max_tokens:
                sequence.ended_by = "length"
        for sequence, start, count in zip(batch.sequences, batch.starts, batch.counts, strict=True):
            if isinstance(sequence.request, EmbedRequest) and start + count == sequence.num_prompt:
                sequence.ended_by = "vector"
        ended = {s for s in (*batch.sequences, *batch.draws) if s.ended_by is not None}
        self.scheduler.advance(batch)
        for sequence in ended:
            assert (sequence.request.request_id, sequence.sample) not in self.finished
            self.finished[sequence.request.request_id, sequence.sample] = list(sequence.generated)
        return batch

    def run(self, most_steps: int = 2000) -> None:
        for _ in range(most_steps):
            if not self.scheduler.has_work:
                return
            assert self.step().token_ids, "a step with work to do computes something"
        raise AssertionError("the requests never end")

    def _compute(self, batch: StepBatch) -> None:
        assert len(batch.token_ids) == sum(batch.counts)
        assert len(batch.token_ids) <= self.scheduler.step_tokens
        assert all(count > 0 for count in batch.counts)
        for sequence, row in zip(batch.draws, batch.draw_rows, strict=True):
            assert batch.starts[row] + batch.counts[row] == len(sequence.tokens), "drawn from another position"
            assert batch.sequences[row].tokens == sequence.tokens
        assert self.scheduler.num_running <= self.scheduler.max_sequences
        self.computed_tokens += len(batch.token_ids)
        self.preempted += batch.num_preempted
        self.found_tokens += batch.num_found_tokens
        width = self.tables.block_tokens
        for g, (cells, group) in enumerate(zip(self.cells, self.tables.groups, strict=True)):
            for source, target in batch.copies[g]:
                for offset in range(width):
                    if source * width + offset in cells:
                        cells[target * width + offset] = cells[source * width + offset]
            written: set[int] = set()
            rows = list(zip(batch.sequences, batch.starts, batch.counts, batch.block_tables[g], strict=True))
            for sequence, start, count, table in rows:
                for position in range(start, start + count):
                    cell = table[position // width] * width + position % width
                    assert table[position // width] >= 0
                    assert cell not in written, "two sequences write one place"
                    written.add(cell)
                    cells[cell] = (position, checksum(sequence.tokens[: position + 1]))
            for sequence, start, count, table in rows:
                for position in sorted(read_by(group.reads, start, start + count)):
                    assert table[position // width] >= 0, "a block that is still read was given back"
                    cell = table[position // width] * width + position % width
                    key = (position, checksum(sequence.tokens[: position + 1]))
                    assert cells.get(cell) == key, "a key of another text, or none"

    def check_nothing_leaked(self) -> None:
        for sequence in (*self.scheduler._running, *self.scheduler._resuming):
            parent, width = ROOT, self.tables.block_tokens
            for i, digest in enumerate(sequence.digests):
                parent = chain(parent, sequence.tokens[i * width : (i + 1) * width])
                assert digest == parent, "a block would be found by another text"
        held: list[list[int]] = [[] for _ in self.tables.groups]
        for sequence in self.scheduler._running:
            for g, table in enumerate(sequence.tables):
                held[g].extend(block for block in table if block >= 0)
        for g, allocator in enumerate(self.tables.allocators):
            assert allocator.num_free == allocator.num_blocks - len(set(held[g]))
            for block in range(allocator.num_blocks):
                assert allocator.references(block) == held[g].count(block)


def one_group(num_blocks: int) -> tuple[GroupCache, ...]:
    return (GroupCache(num_blocks=num_blocks),)
