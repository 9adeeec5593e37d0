"""The scheduler with any mix of requests, failed steps and aborts, in caches of any size and pattern."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.workers.engine.simulated_run import SimulatedRun, alone
from workers.decoder.patterns import EVERYTHING, Reads
from workers.engine.block_tables import GroupCache
from workers.engine.sequence import Phase, Sequence

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
