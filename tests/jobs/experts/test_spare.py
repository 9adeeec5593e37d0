"""Slots for copies of hot experts: a quarter more than experts, of memory that nothing needs more."""

from __future__ import annotations

from typing import Any, cast

import pytest

from jobs.experts.spare import spare_experts
from jobs.spec import ClusterSpec
from workers.forecast import Forecast

GIB = 1 << 30


class Model:
    """Experts of 1 GiB each; a rank takes its share of them and 10 GiB besides."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.bytes_of_an_expert = GIB

    def rank_bytes(self, ranks: int) -> int:
        return (10 + -(-self.num_experts // ranks)) * GIB


def spare(experts: int, ranks: int, room_gib: int | None, **cluster: Any) -> int:
    room = None if room_gib is None else room_gib * GIB
    model = cast(Forecast, Model(experts))
    return spare_experts(ClusterSpec(**cluster), ranks, model=lambda: model, room_bytes=lambda: room)[0]


@pytest.mark.parametrize(
    ("experts", "ranks", "room_gib", "found"),
    [
        (256, 64, 80, 1),  # 5 slots for 4
        (64, 4, 80, 4),  # 20 for 16
        (64, 4, 30, 2),  # of 4 GiB that are left, half
        (64, 4, 26, 0),
        (64, 4, 20, 0),
        (128, 128, 80, 0),  # one more each would be twice as many
        (5, 2, 80, 0),  # 3 each are 20% more already
        (64, 1, 800, 0),
        (64, 4, None, 0),
    ],
)
def test_there_are_as_many_as_a_quarter_more_and_memory_allow(experts, ranks, room_gib, found) -> None:
    assert spare(experts, ranks, room_gib) == found


def test_what_is_asked_for_is_given_and_without_loads_none_is_kept_free() -> None:
    assert spare(64, 4, 20, spare_experts=3) == 3
    assert spare(64, 4, 20, spare_experts=99) == 48, "which is all of them"
    assert spare(64, 4, 80, spare_experts=0) == 0
    assert spare(64, 4, 80, calibration_rows=0) == 0
    assert spare_experts(ClusterSpec(), 4, model=None, room_bytes=lambda: 80 * GIB)[0] == 0
