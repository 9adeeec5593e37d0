"""The reading thread: ahead of the engine, bounded, and never in its way."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from workers.read_ahead import ReadAhead


@dataclass(frozen=True)
class Item:
    """As much of an assignment as the reading thread looks at."""

    index: int
    revision: int = 0


def chunk(item: Item, number: int, num_rows: int = 10, num_tokens: int = 100):
    work = SimpleNamespace(identity=(item.index, item.revision))
    return SimpleNamespace(work=work, rows=range(num_rows), num_tokens=num_tokens, name=(item.index, number))


@pytest.fixture
def read_ahead():
    made = []

    def make(read, *, max_rows=25, max_tokens=10_000, on_begun=lambda: None):
        made.append(ReadAhead(read, max_rows=max_rows, max_tokens=max_tokens, on_begun=on_begun))
        return made[-1]

    yield make
    for one in made:
        one.close()


def take_all(ahead, count):
    return [ahead.take(5).name for _ in range(count)]


def test_chunks_come_in_the_order_of_assignments(read_ahead):
    ahead = read_ahead(lambda item: (chunk(item, number) for number in range(2)))
    ahead.put(Item(0))
    ahead.put(Item(1))
    assert take_all(ahead, 4) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert ahead.take(0) is None


@pytest.mark.parametrize(("bound", "expected"), [({"max_rows": 25}, 3), ({"max_tokens": 250}, 3), ({"max_rows": 1}, 1)])
def test_no_more_is_read_than_the_bound_allows(read_ahead, bound, expected):
    read: list[int] = []

    def reading(item):
        for number in range(50):
            read.append(number)
            yield chunk(item, number)

    ahead = read_ahead(reading, **bound)
    ahead.put(Item(0))
    deadline = time.monotonic() + 5
    while len(read) <= expected and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(read) == expected + 1, "those that fit, and one that waits for room"
    assert take_all(ahead, 50) == [(0, number) for number in range(50)]


def test_a_dropped_assignment_gives_no_more_rows(read_ahead):
    go_on = threading.Event()

    def reading(item):
        yield chunk(item, 0)
        go_on.wait(5)
        yield chunk(item, 1)

    ahead = read_ahead(reading)
    for index in range(3):
        ahead.put(Item(index))
    while not ahead._ready:
        time.sleep(0.01)
    ahead.drop(0, 0)
    ahead.drop(1, 0)
    go_on.set()
    assert take_all(ahead, 2) == [(2, 0), (2, 1)]


def test_what_reading_raises_is_raised_to_the_taker_after_the_rows_before_it(read_ahead):
    def reading(item):
        yield chunk(item, 0)
        raise OSError("the disk is gone")

    ahead = read_ahead(reading)
    ahead.put(Item(0))
    assert ahead.take(5).name == (0, 0)
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.take(5)


def test_it_tells_when_an_assignment_is_begun(read_ahead):
    begun = threading.Semaphore(0)
    ahead = read_ahead(lambda item: iter([chunk(item, 0)]), on_begun=begun.release)
    ahead.put(Item(0))
    assert begun.acquire(timeout=5)
    assert ahead.num_unread == 0
