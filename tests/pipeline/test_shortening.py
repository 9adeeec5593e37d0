from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.shortening import longest_fitting


@given(st.lists(st.integers(0, 5), min_size=1, max_size=200), st.integers(0, 40), st.data())
def test_the_longest_text_that_fits_is_found(steps: list[int], overhead: int, data: st.DataObject) -> None:
    tokens = [overhead]
    for step in steps:
        tokens.append(tokens[-1] + step)
    limit = data.draw(st.integers(0, tokens[-1]))
    if tokens[-1] <= limit:
        return
    expected = max((n for n in range(1, len(steps)) if tokens[n] <= limit), default=0)
    assert longest_fitting(len(steps), tokens[-1], limit, tokens.__getitem__) == expected


@given(st.lists(st.integers(0, 50), min_size=2, max_size=80), st.integers(0, 50))
def test_what_is_found_fits_even_where_counts_go_up_and_down(tokens: list[int], limit: int) -> None:
    found = longest_fitting(len(tokens) - 1, limit + 1, limit, tokens.__getitem__)
    assert found == 0 or tokens[found] <= limit


def test_even_tokens_take_few_counts() -> None:
    counts = []

    def count(length: int) -> int:
        counts.append(length)
        return length // 4 + length // 97

    assert longest_fitting(1_000_000, count(1_000_000), 2000, count) > 7000
    assert len(counts) < 15
