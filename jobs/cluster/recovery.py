"""What becomes of a gang whose node is lost for good: how many ranks have room on the nodes that are left. Pure.

A gang forms again with all its ranks where they have room. Else, after ROOM_S in which a node may come back or an
autoscaler bring another, it forms with as many as have room, if they hold the model together by the rule that
`layout.py` lays a job out by. A replica without any room waits for some, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jobs.layout import GPU_SHARE, HOST_SHARE, Layout

if TYPE_CHECKING:
    from workers.forecast import Forecast

ROOM_S = 10.0

Amounts = Mapping[str, float]  # by Ray's names: CPU, GPU, memory (bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankNeeds:
    """What each rank of a gang takes of its node, by the gang's number of ranks.

    `forecast` None: nothing is known of the model, which then holds on any number. `gpu_bytes`: a GPU's memory, where
    the ranks are on GPUs and it can be told.
    """

    layout: Layout
    forecast: Forecast | None
    gpu_bytes: int | None

    def of(self, ranks: int) -> Amounts | None:
        """None: so few ranks can't hold the model. As many as the job was laid out with are not questioned again."""
        layout, forecast = self.layout, self.forecast
        needs = {"CPU": float(layout.threads)}
        if layout.device == "cuda":
            needs["GPU"] = 1.0
        if forecast is None or ranks == layout.ranks:
            return needs | ({"memory": float(layout.memory_bytes)} if layout.memory_bytes else {})
        if layout.device == "cuda":
            return needs if forecast.rank_bytes(ranks) <= GPU_SHARE * (self.gpu_bytes or 0) else None
        return needs | {"memory": forecast.rank_bytes(ranks) / HOST_SHARE}

    def why_not(self, ranks: int, places: int, most: int) -> str:
        """For people: why a gang of `ranks`, of which `places` have room, forms with `most` or, if 0, not at all."""
        have = f"{places or 'none'} of a replica's {ranks} workers have room on the nodes that are left"
        if not places or most >= places or self.forecast is None:
            return have
        size = f"{self.forecast.rank_bytes(places) / 2**30:,.1f} GiB"
        return f"{have}, and over {places} the model takes {size} on each, which is more than they can count on"


def resized(layout: Layout, ranks: int, forecast: Forecast | None) -> Layout:
    """The layout of a gang that has so many ranks.

    Each has spare slots for as many experts as leave it no larger than before, and what `auto` set aside for it is what
    it takes then. `forecast` None: nothing is known of the model.
    """
    if ranks == layout.ranks:
        return layout
    if forecast is None:
        return replace(layout, ranks=ranks, spare_experts=0)
    more = -(-forecast.num_experts // ranks) - -(-forecast.num_experts // layout.ranks)
    spare = max(0, layout.spare_experts - more) if ranks > 1 else 0
    memory_bytes = forecast.rank_bytes(ranks) + spare * forecast.bytes_of_an_expert
    aside = memory_bytes if layout.memory_bytes and ranks > 1 else 0
    return replace(layout, ranks=ranks, spare_experts=spare, memory_bytes=aside)


def room_left(nodes: Mapping[str, Amounts], held: Iterable[tuple[str, Amounts]]) -> list[dict[str, float]]:
    """What each living node has, less what other gangs' ranks hold of it: pairs of a node and a rank's needs."""
    left = {node: dict(amounts) for node, amounts in nodes.items()}
    for node, amounts in held:
        for name, amount in amounts.items():
            if node in left:
                left[node][name] = left[node].get(name, 0.0) - amount
    return list(left.values())


def num_places(rooms: Sequence[Amounts], needs: Amounts, *, apart: bool = False) -> int:
    """How many ranks that need so much have room, each whole on one node, and `apart` at most one on each.

    >>> num_places([{"CPU": 5.0}, {"CPU": 1.0}], {"CPU": 2.0})
    2
    """
    wanted = [(name, amount) for name, amount in needs.items() if amount > 0]
    assert wanted, "a rank that needs nothing has room without end"
    places = [max(0, min(int(room.get(name, 0.0) // amount) for name, amount in wanted)) for room in rooms]
    return sum(min(count, 1) for count in places) if apart else sum(places)


def most_ranks(
    rooms: Sequence[Amounts], needs: Callable[[int], Amounts | None], most: int, *, apart: bool = False
) -> int:
    """The largest gang, of up to `most` ranks, that has room; 0 if none has."""
    for ranks in range(most, 0, -1):
        amounts = needs(ranks)
        if amounts is not None and num_places(rooms, amounts, apart=apart) >= ranks:
            return ranks
    return 0
