"""The scheduler against a cache that remembers what was written where, so that any wrongly shared block shows."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.embedding import VectorForm
from pipeline.errors import RowError
from workers.decoder.patterns import EVERYTHING, Reads
from workers.engine.block_tables import BlockTables, GroupCache
from workers.engine.blocks import ROOT, chain
from workers.engine.request import EmbedRequest, GenerateRequest, SamplingParams, VectorRequest
from workers.engine.scheduler import Scheduler, StepBatch
from workers.engine.sequence import Phase, Sequence

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


def test_prefill_and_decode_share_a_step() -> None:
    run = SimulatedRun(one_group(50))
    run.add(0, [1, 2, 3])
    run.step()
    run.add(1, [4, 5, 6])
    assert run.step().counts == [1, 3]


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks_while_others_decode() -> None:
    run = SimulatedRun(one_group(50), step_tokens=8)
    run.add(0, [1, 2, 3], max_new_tokens=6)
    run.step()
    run.add(1, list(range(1, 21)))
    assert [run.step().counts for _ in range(3)] == [[1, 7], [1, 7], [1, 6]]


def test_rows_that_share_a_prompt_and_are_admitted_together_compute_it_once() -> None:
    run = SimulatedRun(one_group(200), step_tokens=200, max_sequences=100)
    system = list(range(1, 41))  # 10 whole blocks
    for row in range(20):
        run.add(row, [*system, row + 50, row + 51])
    batch = run.step()
    assert len(batch.sequences) == 20
    assert len(batch.token_ids) == 40 + 20 * 2
    run.run()
    run.check_nothing_leaked()


def test_samples_of_one_request_compute_its_prompt_once() -> None:
    prompt = [1, 2, 3, 4, 5, 6]  # one whole block and half of another
    run = SimulatedRun(one_group(100))
    run.add(0, prompt, n=5, max_new_tokens=6)
    first = run.step()
    assert first.counts == [6]
    assert [s.sample for s in first.draws] == [0, 1, 2, 3, 4]
    assert run.step().num_prefill_tokens == 0
    run.run()
    new_tokens = sum(len(tokens) - 1 for tokens in run.finished.values())  # the last one is never computed
    assert run.computed_tokens == len(prompt) + new_tokens
    assert run.finished == {(0, sample): alone(prompt, sample, 12) for sample in range(5)}


def test_samples_share_their_prompt_also_when_prefixes_are_not_reused() -> None:
    run = SimulatedRun(one_group(100), reuse_prefixes=False)
    run.add(0, [1, 2, 3, 4, 5, 6], n=5, max_new_tokens=6)
    run.step()
    assert run.step().num_prefill_tokens == 0
    run.run()
    assert run.finished == {(0, sample): alone([1, 2, 3, 4, 5, 6], sample, 12) for sample in range(5)}


def test_later_samples_of_a_request_go_before_later_requests() -> None:
    run = SimulatedRun(one_group(100), max_sequences=4)
    long = [[a, b] for a in range(1, 7) for b in range(1, 7) if min(len(alone([a, b], n, 10)) for n in range(3)) > 4]
    for row in range(3):
        run.add(row, long[row], n=3)
    run.step()  # the later samples of row 0 draw here, but rows 1 and 2 were admitted before
    assert [s.order for s in run.step().sequences] == [(0, 0), (1, 0), (2, 0), (0, 1)]
    assert [s.order for s in run.step().sequences] == [(0, 0), (0, 1), (1, 0), (2, 0)]


def test_a_prompt_is_not_copied_from_blocks_that_are_being_filled_in_the_same_step() -> None:
    letters = range(1, 7)
    prompts = [[a, b, c] * 2 for a in letters for b in letters for c in letters]
    prompt = next(p for p in prompts if min(len(alone(p, 0, 15)), len(alone(p, 1, 12))) > 5)
    run = SimulatedRun(one_group(100), step_tokens=40, max_context=15)
    run.add(0, [*prompt, *alone(prompt, 0, 9)])  # holds, as its prompt, what the next row will have generated
    run.add(1, prompt, n=2)
    for _ in range(3):
        run.step()
    run.scheduler.schedule()
    run.scheduler.roll_back()
    run.cells[0].clear()
    batch = run.step()  # row 1's first sample finds its whole prompt in blocks that row 0 fills now
    assert [s.order for s in batch.sequences] == [(0, 0), (1, 0), (1, 1)]
    assert batch.copies == [[]]
    run.run()
    assert run.finished[1, 1] == alone(prompt, 1, 14)


@pytest.mark.parametrize("first_step_fails", [False, True])
def test_a_later_sample_may_start_long_after_the_first(first_step_fails: bool) -> None:
    letters = range(1, 7)
    prompts = [[a, b, c] * 2 for a in letters for b in letters for c in letters]
    first, second = [p for p in prompts if len(alone(p, 0, 20)) > 12][:2]
    run = SimulatedRun(one_group(100), max_sequences=2)
    run.add(0, first, max_new_tokens=5)
    run.add(1, second, max_new_tokens=14, n=2)  # its second sample waits until row 0 ends
    if first_step_fails:
        run.scheduler.schedule()
        run.scheduler.roll_back()
        run.cells[0].clear()
    while run.scheduler.has_work:
        run.step()
        run.check_nothing_leaked()
    assert run.finished[1, 1] == alone(second, 1, 20)


def test_a_newcomer_leaves_room_for_those_that_run() -> None:
    run = SimulatedRun(one_group(9), step_tokens=32, reuse_prefixes=False)
    for row in range(2):
        run.add(row, [3 + row] * 16, max_new_tokens=4)  # 4 blocks each, and soon one more each
    run.step()
    assert run.scheduler.num_running == 1
    run.run()
    assert run.preempted == 0


def test_found_blocks_that_nobody_held_are_no_longer_free_for_the_rest() -> None:
    run = SimulatedRun(one_group(10), step_tokens=64)
    long = next([a, b] for a in range(1, 7) for b in range(1, 7) if len(alone([a, b], 0, 20)) > 10)
    prompt = list(range(10, 34))  # 6 blocks
    run.add(0, prompt, max_new_tokens=1)
    run.run()
    run.add(1, long, max_new_tokens=18)
    run.step()
    run.add(2, [*prompt, *range(40, 49)], max_new_tokens=1)  # 9 blocks: 6 of the 9 that are free, and 3 more
    assert [s.order[0] for s in run.step().sequences] == [1]
    run.run()
    assert run.found_tokens == 24


def test_a_later_sample_finds_the_prompt_again_after_the_first_one_ended() -> None:
    run = SimulatedRun(one_group(100), max_sequences=1)
    run.add(0, [1, 2, 3, 4, 5, 6, 7, 8, 9], n=3)
    run.run()
    assert run.found_tokens == 2 * 8
    assert run.finished == {(0, sample): alone([1, 2, 3, 4, 5, 6, 7, 8, 9], sample, 17) for sample in range(3)}


def test_without_blocks_the_youngest_is_preempted_and_computed_again() -> None:
    run = SimulatedRun(one_group(6), step_tokens=32)
    prompts = [[a, b] for a in range(1, 7) for b in range(1, 7) if len(alone([a, b], 0, 18)) > 8]
    assert len(prompts) > 3
    for row, prompt in enumerate(prompts):
        run.add(row, prompt, max_new_tokens=16)
    run.run()
    assert run.preempted > 0
    assert run.finished == {(row, 0): alone(prompt, 0, 18) for row, prompt in enumerate(prompts)}
    run.check_nothing_leaked()


def test_requests_start_in_the_order_in_which_they_came_even_if_a_later_one_would_fit() -> None:
    run = SimulatedRun(one_group(6), reuse_prefixes=False)
    run.add(0, [1] * 15, max_new_tokens=4)
    run.add(1, [2] * 16, max_new_tokens=4)
    run.add(2, [3], max_new_tokens=1)
    assert [s.request.request_id for s in run.step().sequences] == [0]
    started = [s.request.request_id for _ in range(4) for s in run.step().sequences]
    assert 2 not in started[: started.index(1)]


def test_blocks_behind_the_window_serve_other_sequences() -> None:
    windowed = (GroupCache(num_blocks=5, reads=Reads(window=4)),)
    run = SimulatedRun(windowed, step_tokens=4, max_context=60)
    run.add(0, [1, 2, 3], max_new_tokens=50)  # 13 blocks, were none given back
    run.run()
    assert run.finished[0, 0] == alone([1, 2, 3], 0, 53)


def test_groups_with_and_without_a_window_find_a_common_prefix() -> None:
    groups = (GroupCache(num_blocks=40), GroupCache(num_blocks=40, reads=Reads(window=6)))
    run = SimulatedRun(groups)
    run.add(0, list(range(1, 15)), max_new_tokens=1)
    run.run()
    run.add(1, [*range(1, 15), 20], max_new_tokens=1)
    batch = run.step()
    assert batch.num_found_tokens == 12
    assert list(batch.block_tables[1][0][:1]) == [-1]  # positions 0 to 3 lie before the window of position 12


@pytest.mark.parametrize(
    ("prompt", "options", "code"),
    [
        ([], {}, "empty_prompt"),
        ([1] * 64, {}, "prompt_too_long"),
        ([1] * 65, {"embed": "mean"}, "prompt_too_long"),
        ([1] * 41, {"max_new_tokens": 1}, "request_too_large"),
        ([1] * 20, {"max_new_tokens": 22}, "request_too_large"),
        ([1] * 41, {"embed": "mean"}, "request_too_large"),
    ],
)
def test_what_could_never_be_served_is_refused(prompt: list[int], options: dict[str, Any], code: str) -> None:
    run = SimulatedRun(one_group(10))  # 40 positions
    refused = run.add(0, prompt, **options)
    assert isinstance(refused, RowError)
    assert refused.code == code
    assert not run.scheduler.has_work


def test_what_just_fits_the_cache_is_served_to_its_end() -> None:
    run = SimulatedRun(one_group(10))
    run.add(0, [1] * 40, max_new_tokens=1)
    run.add(1, [1] * 20, max_new_tokens=21)
    run.add(2, [1] * 40, embed="mean")
    run.run()
    assert set(run.finished) == {(0, 0), (1, 0), (2, 0)}


def test_a_generation_ends_where_the_context_ends() -> None:
    run = SimulatedRun(one_group(50), max_context=16)
    run.add(0, [3, 3], max_new_tokens=1000)
    run.run()
    assert run.finished[0, 0] == alone([3, 3], 0, 16)


def test_nothing_to_do_makes_an_empty_batch() -> None:
    run = SimulatedRun(one_group(10))
    batch = run.step()
    assert batch.sequences == batch.token_ids == []


def test_a_mean_of_a_prompt_is_never_taken_from_a_found_prefix() -> None:
    run = SimulatedRun(one_group(50), step_tokens=32)
    run.add(0, list(range(1, 13)))
    run.run()
    run.add(1, list(range(1, 13)), embed="mean")
    run.add(2, list(range(1, 13)), embed="last")
    assert run.step().counts == [12, 4]


def test_nobody_looks_for_the_blocks_of_a_mean_so_they_are_not_kept() -> None:
    run = SimulatedRun(one_group(50))
    run.add(0, list(range(1, 13)), embed="mean")
    run.run()
    run.add(1, list(range(1, 13)))
    run.run()
    assert run.found_tokens == 0


WINDOW = st.builds(Reads, window=st.integers(1, 9))
FIXED = st.builds(
    lambda block, summary, near: Reads(
        block=block if near else None,
        window=None if near else 1,
        period=block,
        summary=(max(0, block - summary), block),
    ),
    st.integers(1, 10),
    st.integers(1, 10),
    st.booleans(),
)
READS = st.just(EVERYTHING) | WINDOW | FIXED | st.builds(Reads, block=st.integers(1, 10))


@given(st.integers(1, 60), READS, st.integers(1, 6), st.integers(1, 20))
def test_a_lone_sequence_is_served_by_as_many_blocks_as_it_needs(
    num_tokens: int, reads: Reads, block_tokens: int, step_tokens: int
) -> None:
    needed = reads.most_entries(num_tokens, block_tokens=block_tokens, step_tokens=step_tokens)
    run = SimulatedRun(
        (GroupCache(num_blocks=needed, reads=reads),),
        block_tokens=block_tokens,
        step_tokens=step_tokens,
        max_context=100,
    )
    run.add(0, [1] * num_tokens, embed="mean")
    run.run()
    assert list(run.finished) == [(0, 0)]


def test_blocks_without_summaries_serve_other_sequences_from_the_middle_of_a_table() -> None:
    fixed = Reads(block=16, period=16, summary=(14, 16))
    run = SimulatedRun((GroupCache(num_blocks=8, reads=fixed),), step_tokens=4, max_context=70)
    run.add(0, [1] * 60, embed="last")  # 15 blocks, were none given back
    while run.scheduler.has_work:
        run.step()
        run.check_nothing_leaked()
        for sequence in run.scheduler._running:
            past = sequence.tables[0][: sequence.num_trimmed[0]]
            assert [block >= 0 for block in past] == [index % 4 == 3 for index in range(len(past))]
    assert list(run.finished) == [(0, 0)]


PROMPTS = st.lists(st.integers(1, 2), max_size=14)  # two letters only, so that prefixes meet


class Scheduling(RuleBasedStateMachine):
    """Any mix of requests, steps, failed steps and aborts, in any small cache."""

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        shapes = data.draw(st.lists(st.tuples(st.integers(1, 12), READS), min_size=1, max_size=2))
        self.run = SimulatedRun(
            tuple(GroupCache(num_blocks=blocks, reads=reads) for blocks, reads in shapes),
            block_tokens=data.draw(st.integers(1, 4)),
            step_tokens=data.draw(st.integers(1, 12)),
            max_sequences=data.draw(st.integers(1, 4)),
            max_context=data.draw(st.integers(2, 24)),
            reuse_prefixes=data.draw(st.booleans()),
        )
        self.expected: dict[tuple[int, int], list[int]] = {}
        self.alive: dict[int, Sequence] = {}
        self.started: list[int] = []
        self.next_id = 0

    @rule(prompt=PROMPTS, max_new_tokens=st.integers(1, 12), n=st.integers(1, 3))
    def add_generation(self, prompt: list[int], max_new_tokens: int, n: int) -> None:
        added = self.run.add(self.next_id, prompt, max_new_tokens, n)
        if isinstance(added, Sequence):
            self.alive[self.next_id] = added
            end = min(len(prompt) + max_new_tokens, self.run.scheduler.max_context)
            for sample in range(n):
                self.expected[self.next_id, sample] = alone(prompt, sample, end)
        self.next_id += 1

    @rule(prompt=PROMPTS, pooling=st.sampled_from(["mean", "last"]))
    def add_embedding(self, prompt: list[int], pooling: str) -> None:
        added = self.run.add(self.next_id, prompt, embed=pooling)
        if isinstance(added, Sequence):
            self.alive[self.next_id] = added
            self.expected[self.next_id, 0] = []
        self.next_id += 1

    @rule(times=st.integers(1, 4))
    def steps(self, times: int) -> None:
        for _ in range(times):
            self.step()

    def step(self) -> None:
        had_work = self.run.scheduler.has_work
        oldest = self.run.scheduler._running[:1]
        batch = self.run.step()
        assert bool(batch.token_ids) == had_work
        assert batch.sequences[:1] == oldest or not oldest, "the oldest running sequence waits"
        for sequence in sorted(batch.sequences, key=lambda s: s.order):
            if sequence.request.request_id not in self.started:
                self.started.append(sequence.request.request_id)
        assert self.started == sorted(self.started), "a later request overtook an earlier one"

    @rule()
    def step_that_fails(self) -> None:
        batch = self.run.scheduler.schedule()
        for sequence in sorted(batch.sequences, key=lambda s: s.order):
            if sequence.request.request_id not in self.started:
                self.started.append(sequence.request.request_id)
        for cells in self.run.cells:
            cells.clear()
        self.run.scheduler.roll_back()

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.alive)))
        self.run.scheduler.abort(self.alive.pop(request_id))
        for key in [key for key in self.expected if key[0] == request_id and key not in self.run.finished]:
            del self.expected[key]

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "run"):
            self.run.check_nothing_leaked()
            scheduler = self.run.scheduler
            assert all(s.phase is Phase.RUNNING for s in scheduler._running)
            for queue in (scheduler._running, scheduler._resuming, [*scheduler._resuming[-1:], *scheduler._waiting]):
                orders = [s.order for s in queue if s.phase is not Phase.ENDED]
                assert orders == sorted(orders)

    def teardown(self) -> None:
        if hasattr(self, "run"):
            self.run.run()
            assert self.run.finished == self.expected
            assert self.run.scheduler.num_waiting == self.run.scheduler.num_running == 0
            assert all(allocator.num_free == allocator.num_blocks for allocator in self.run.tables.allocators)


Scheduling.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestScheduling = Scheduling.TestCase


def test_most_tokens_is_what_just_fits() -> None:
    groups = (GroupCache(num_blocks=12), GroupCache(num_blocks=3, reads=Reads(window=4)))
    tables = BlockTables(groups, block_tokens=4, step_tokens=4)
    most = tables.most_tokens()
    assert tables.could_ever_hold(most)
    assert not tables.could_ever_hold(most + 1)
    assert array("i") == tables.new_tables()[0]
