"""Which ranks of a gang take over requests that wait at others. Pure, and every rank computes the same from the same.

Sequences stay where they run, since their keys and values lie there; what has not begun may go anywhere. So the last
rows of a job, and those that one rank was quicker to read, are spread over the whole gang.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Move(NamedTuple):
    source: int
    target: int
    requests: int


def share_out(waiting: Sequence[int], running: Sequence[int]) -> list[Move]:
    """waiting and running [R]: requests that have not begun and those that have. -> who gives how many to whom.

    Only ranks at which nothing waits are given any, so that a gang whose ranks all have enough moves nothing, and
    nobody gives until it has less than the one it gives to.

    >>> share_out([6, 0], [0, 0])
    [Move(source=0, target=1, requests=3)]
    >>> share_out([6, 1], [9, 0])
    []
    """
    loads = [begun + not_begun for begun, not_begun in zip(running, waiting, strict=True)]
    left = list(waiting)
    givers = [rank for rank, count in enumerate(waiting) if count]
    hungry = [rank for rank, count in enumerate(waiting) if not count]
    moves: dict[tuple[int, int], int] = {}
    while hungry and (full := [rank for rank in givers if left[rank]]):
        source = max(full, key=lambda rank: (loads[rank], -rank))
        target = min(hungry, key=lambda rank: (loads[rank], rank))
        gap = loads[source] - loads[target]
        if gap < 2:
            break
        count = min(left[source], max(1, gap // (2 * len(hungry))))
        moves[source, target] = moves.get((source, target), 0) + count
        left[source] -= count
        loads[source] -= count
        loads[target] += count
    return [Move(source, target, count) for (source, target), count in sorted(moves.items())]
