"""How many experts of a layer each rank of a gang holds beyond the least: slots for copies of hot ones. Pure.

`auto`: as many as make a quarter more, as long as they take no more than half of what weights and the least cache leave
of the memory that a shard can count on; the cache has better use for the rest. None where no loads are measured, since
then nobody knows which experts are hot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from jobs.spec import ClusterSpec
from jobs.terminal import human_bytes

if TYPE_CHECKING:
    from workers.forecast import Forecast

MORE = 0.25  # than experts
SHARE = 0.5  # of the memory that is left


def spare_experts(
    cluster: ClusterSpec, ranks: int, *, model: Callable[[], Forecast] | None, room_bytes: Callable[[], int | None]
) -> tuple[int, str]:
    """The number a rank and layer, and why, for people. `model` and `room_bytes` (a shard's) are asked if need be."""
    if ranks == 1:
        return 0, "one shard holds each expert"
    if cluster.spare_experts != "auto":
        asked = cluster.spare_experts
        if asked and model is not None:
            num_experts = model().num_experts
            asked = min(asked, num_experts - -(-num_experts // ranks))  # with these a shard holds all of them
        return asked, "as the job asks"
    if cluster.calibration_rows == 0:
        return 0, "no loads are measured"
    room = room_bytes()
    if model is None or room is None:
        return 0, "it isn't known how much memory there is for them"
    forecast = model()
    experts = max(1, forecast.num_experts)
    most = max(0, int((1 + MORE) * experts / ranks) - -(-experts // ranks))
    if not most:
        return 0, "a quarter more than its experts is not one more for each shard"
    left = max(0, room - forecast.rank_bytes(ranks))
    each = max(1, forecast.bytes_of_an_expert)
    spare = min(most, int(SHARE * left) // each)
    return spare, f"{human_bytes(each)} each, and {human_bytes(left)} are left beside weights and cache"
