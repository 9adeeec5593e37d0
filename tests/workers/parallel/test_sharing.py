"""Requests that wait go to ranks at which nothing waits, until all have about as much, and none is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.parallel.sharing import share_out

RANKS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=9)


@given(RANKS)
def test_every_rank_that_gives_is_left_with_no_less_than_those_it_gives_to(ranks: list[tuple[int, int]]) -> None:
    waiting, running = [list(column) for column in zip(*ranks, strict=True)]
    before = [a + b for a, b in ranks]
    after, given_away, given_to = list(before), [0] * len(ranks), [0] * len(ranks)
    for move in share_out(waiting, running):
        assert move.requests > 0
        after[move.source] -= move.requests
        after[move.target] += move.requests
        given_away[move.source] += move.requests
        given_to[move.target] += move.requests
    for rank in range(len(ranks)):
        assert given_away[rank] <= waiting[rank]
        assert not (given_to[rank] and waiting[rank]), "who has requests waiting is given none"
        if given_to[rank]:
            assert after[rank] <= max(before)
    hungry = [after[rank] for rank in range(len(ranks)) if not waiting[rank]]
    fed = [after[rank] for rank in range(len(ranks)) if waiting[rank] > given_away[rank]]
    if hungry and fed:
        assert max(fed) - min(hungry) < 2, "nothing is left waiting that a rank with less could take"


def test_a_gang_whose_ranks_all_have_requests_waiting_moves_none() -> None:
    assert share_out([256, 3, 1], [256, 0, 0]) == []


def test_a_single_request_stays_where_it_is() -> None:
    assert share_out([1, 0], [0, 0]) == []
    assert share_out([0, 0], [5, 0]) == []
