"""Items that a thread takes ahead of their use."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from pipeline.errors import JobError
from pipeline.index.vectors import ahead


def test_the_next_item_is_taken_while_one_is_used() -> None:
    is_taken = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number, event in enumerate(is_taken):
            event.set()
            yield number

    taken = ahead(items())
    assert next(taken) == 0
    assert is_taken[1].wait(60)
    assert not is_taken[2].is_set(), "one, not all of them"
    assert list(taken) == [1, 2]


def test_what_fails_fails_where_it_would_have_and_nothing_is_left_running() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise JobError("part 1 can't be read")

    before = threading.active_count()
    taken = ahead(items())
    assert next(taken) == 0
    with pytest.raises(JobError, match="part 1"):
        next(taken)
    unused = ahead(iter(range(9)))
    assert next(unused) == 0
    unused.close()
    assert threading.active_count() == before


def test_there_may_be_nothing() -> None:
    assert list(ahead(iter(()))) == []
