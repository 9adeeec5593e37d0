"""The scheduler's choices, step by step, against a cache that remembers what was written where."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from pipeline.errors import RowError
from tests.workers.engine.simulated_run import SimulatedRun, alone, one_group
from workers.decoder.patterns import Reads
from workers.engine.block_tables import BlockTables, GroupCache


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


def test_most_tokens_is_what_just_fits() -> None:
    groups = (GroupCache(num_blocks=12), GroupCache(num_blocks=3, reads=Reads(window=4)))
    tables = BlockTables(groups, block_tokens=4, step_tokens=4)
    most = tables.most_tokens()
    assert tables.could_ever_hold(most)
    assert not tables.could_ever_hold(most + 1)
    assert array("i") == tables.new_tables()[0]
