"""What block tables may forget of a sequence, against what queries see by the definition of their pattern."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.decoder.attention import AttentionSpec, visible
from workers.decoder.patterns import Fixed, Form, Reads, Strided

FORMS: tuple[Form, ...] = ("merged", "divided", "first", "second")
FORM = st.sampled_from(FORMS)
STRIDED = st.builds(Strided, stride=st.integers(1, 20), form=FORM)
FIXED = st.integers(1, 24).flatmap(
    lambda block: st.builds(
        Fixed, block=st.just(block), summary=st.integers(1, block), form=FORM, distinct=st.booleans()
    )
)
PATTERN = st.none() | st.integers(1, 30) | STRIDED | FIXED  # full, a window, factorised


def spec_of(pattern: int | Strided | Fixed | None) -> AttentionSpec:
    window, sparse = (pattern, None) if isinstance(pattern, int) else (None, pattern)
    return AttentionSpec(
        num_heads=4, num_kv_heads=2, head_width=1, value_width=1, scale=1.0, window=window, sparse=sparse
    )


@given(PATTERN, st.integers(1, 9), st.integers(0, 60), st.integers(0, 60))
def test_an_entry_is_in_use_as_long_as_a_later_query_reads_of_it(
    pattern: int | Strided | Fixed | None, block_tokens: int, position: int, length: int
) -> None:
    reads = spec_of(pattern).reads
    at = torch.arange(300)
    seen = visible(spec_of(pattern), at[:, None], at).any(dim=0)  # [query, key]
    read = {int(key) // block_tokens for key in seen[position:].any(dim=0).nonzero()}
    num_entries = -(-length // block_tokens)
    in_use = list(reads.entries(position, num_entries, block_tokens))
    assert in_use == sorted(set(in_use))
    assert {entry for entry in read if entry < num_entries} <= set(in_use), "given back and read"
    # What is kept without need shares the query's own block of positions, which is read from its beginning on.
    idle = set(in_use) - read
    assert all(entry >= reads.near_start(position) // block_tokens for entry in idle)
    assert len(idle) <= -(-(position - reads.near_start(position) + 1) // block_tokens) + 1


@given(PATTERN, st.integers(1, 9), st.integers(0, 70))
def test_kept_entries_are_counted_without_looking_at_each(
    pattern: int | Strided | Fixed | None, block_tokens: int, num_entries: int
) -> None:
    reads = spec_of(pattern).reads
    assert reads.num_kept(num_entries, block_tokens) == sum(
        reads.keeps(entry, block_tokens) for entry in range(num_entries)
    )


@given(PATTERN, st.integers(1, 9), st.integers(1, 20), st.integers(1, 120))
def test_most_entries_is_the_most_that_any_step_from_anywhere_has_in_use(
    pattern: int | Strided | Fixed | None, block_tokens: int, step_tokens: int, num_tokens: int
) -> None:
    reads = spec_of(pattern).reads
    most = 0
    for start in range(num_tokens):
        end = min(start + step_tokens, num_tokens)
        most = max(most, len(list(reads.entries(start, -(-end // block_tokens), block_tokens))))
    assert reads.most_entries(num_tokens, block_tokens=block_tokens, step_tokens=step_tokens) == most


def test_a_block_with_summaries_outlives_its_neighbours() -> None:
    reads = spec_of(Fixed(block=32, summary=4)).reads
    assert list(reads.entries(70, 5, 16)) == [1, 3, 4]  # 28..31 and 60..63 lie in entries 1 and 3
    assert list(reads.entries(63, 4, 16)) == [1, 2, 3]


def test_summaries_that_no_head_attends_to_are_not_kept() -> None:
    few = AttentionSpec(
        num_heads=2,
        num_kv_heads=1,
        head_width=1,
        value_width=1,
        scale=1.0,
        sparse=Fixed(block=32, summary=4, distinct=True),
    )
    assert few.reads == Reads(block=32, period=32, summary=(24, 32))


@pytest.mark.parametrize("form", FORMS)
def test_an_early_query_sees_at_least_itself(form: Form) -> None:
    spec = spec_of(Fixed(block=8, summary=2, form=form))
    at = torch.arange(20)
    assert bool(visible(spec, at[:, None], at).any(dim=-1).all())
