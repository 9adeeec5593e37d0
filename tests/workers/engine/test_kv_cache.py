from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.engine.kv_cache import CacheShape, GroupNeed, auto_budget_bytes, available_bytes, split_budget

SHAPE = CacheShape(block_tokens=16, step_tokens=512, max_context=4096, max_sequences=256)


def test_one_group_gets_all_the_blocks_that_the_budget_buys() -> None:
    [group] = split_budget([GroupNeed(block_bytes=1000)], 1_000_999, SHAPE)
    assert group.num_blocks == 1000


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.none() | st.integers(1, 5000)), min_size=1, max_size=3),
    st.integers(0, 10**10),
)
def test_the_budget_is_never_exceeded(needs: list[tuple[int, int | None]], budget: int) -> None:
    groups = [GroupNeed(block_bytes=block_bytes, window=window) for block_bytes, window in needs]
    try:
        split = split_budget(groups, budget, SHAPE)
    except ValueError:
        return
    assert sum(cache.num_blocks * need.block_bytes for cache, need in zip(split, groups, strict=True)) <= budget
    assert all(cache.num_blocks > 0 for cache in split)


def test_groups_are_filled_at_the_same_time_by_typical_sequences() -> None:
    needs = [GroupNeed(block_bytes=100), GroupNeed(block_bytes=100, window=128)]
    full, windowed = split_budget(needs, 10**6, SHAPE)
    sequences = [
        cache.num_blocks // SHAPE.blocks(need, 1024) for cache, need in zip((full, windowed), needs, strict=True)
    ]
    assert abs(sequences[0] - sequences[1]) <= 1


def test_more_than_all_sequences_could_use_is_not_taken() -> None:
    needs = [GroupNeed(block_bytes=1)]
    [group] = split_budget(needs, 10**12, SHAPE)
    assert group.num_blocks == SHAPE.most_bytes(needs) == 256 * 256


def test_the_least_budget_that_is_named_is_enough() -> None:
    needs = [GroupNeed(block_bytes=700), GroupNeed(block_bytes=100, window=128)]
    with pytest.raises(ValueError, match="kv_cache_bytes is 100") as refused:
        split_budget(needs, 100, SHAPE)
    least = int(str(refused.value).split()[-1])
    split_budget(needs, least, SHAPE)
    with pytest.raises(ValueError):
        split_budget(needs, least - 1, SHAPE)


def test_auto_leaves_most_of_the_memory_that_is_there() -> None:
    cpu = torch.device("cpu")
    huge = [GroupNeed(block_bytes=10**9)]
    assert 0 < auto_budget_bytes(huge, SHAPE, cpu) <= available_bytes(cpu) * 0.3
    assert 0 < auto_budget_bytes(huge, SHAPE, cpu, sharers=4) <= available_bytes(cpu) * 0.075
    assert auto_budget_bytes([GroupNeed(block_bytes=10)], SHAPE, cpu) == 256 * 256 * 10
