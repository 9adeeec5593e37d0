"""Replicas that Ray has no room for: which of them wait, and which form smaller, by the rule of `recovery.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jobs.cluster.hosts import Ground, survey
from jobs.cluster.nodes import end_stopped
from jobs.cluster.recovery import ROOM_S, RankNeeds, most_ranks, num_places, room_left
from jobs.events import ReplicaResized
from jobs.layout import Layout
from jobs.spec import ClusterSpec
from workers.replica import FORMING_S, Replica, ReplicaLost

SHARD_TITLE = "ray::ShardActor"  # as Ray names the process
LOOK_S = 1.0  # between two looks at what room there is


@dataclass(slots=True, kw_only=True)
class _Watched:
    generation: int
    look_at: float = 0.0
    placed_at: float | None = None
    end_stopped_at: float = 0.0
    waits: bool = False


class RoomWatch:
    """Looks at the replicas that are forming, now and then, and says what is to change about them."""

    def __init__(self, layout: Layout, needs: Callable[[], RankNeeds], cluster: ClusterSpec) -> None:
        """`needs` is asked once, when a replica lacks room for the first time."""
        self._layout = layout
        self._ask_needs = needs
        self._cluster = cluster
        self._needs: RankNeeds | None = None
        self._watched: dict[int, _Watched] = {}
        self._sizes: dict[int, int] = {}  # of replicas that had to do with fewer ranks

    def first_size(self, number: int, others: list[Replica]) -> int:
        """With how many ranks to form a replica: all, unless it lacked room before and still does."""
        if number not in self._sizes:
            return self._layout.ranks
        ranks = self._most_ranks(others, survey(self._cluster))[0] or self._sizes[number]
        self._resize(number, ranks)
        return ranks

    def look(
        self, number: int, generation: int, replica: Replica, others: list[Replica], now: float
    ) -> ReplicaResized | None:
        """What is new about the replica's room. If it is still forming and may have ranks, it is to form again.

        A replica that never had all of its ranks waits for them: only what was lost is made do without.
        ReplicaLost if it has had room for FORMING_S and its processes don't come up.
        """
        watched = self._watched.get(number)
        if watched is None or watched.generation != generation:
            watched = self._watched[number] = _Watched(generation=generation)
        if not replica.is_forming:
            return self._found_room(number, watched, replica)
        waited_s, forming_s = now - replica.began_at, self._cluster.wait_s or FORMING_S
        patience_s = ROOM_S if generation else forming_s
        if waited_s < min(ROOM_S, patience_s) or now < watched.look_at:
            return None
        watched.look_at = now + LOOK_S
        if places := replica.places():
            watched.placed_at = watched.placed_at or now
            if now - watched.placed_at > FORMING_S:
                raise ReplicaLost(f"a worker process of {replica.name} did not come up in {FORMING_S:.0f} seconds")
            if now >= watched.end_stopped_at:
                watched.end_stopped_at = now + ROOM_S
                end_stopped(set(places), SHARD_TITLE)
            return None
        watched.placed_at = None
        if waited_s < patience_s:
            return None
        if generation == 0:
            return self._wait(number, watched, replica.why_not_formed())
        ground = survey(self._cluster)
        ranks, reason = self._most_ranks(others, ground)
        if ranks == 0:
            return self._wait(number, watched, reason)
        if ranks != replica.num_ranks or replica.location != ground.location:  # or a node is within reach again
            watched.waits = False
            self._resize(number, ranks)
            return ReplicaResized(number, generation, ranks, reason)
        return self._wait(number, watched, replica.why_not_formed()) if waited_s > forming_s else None

    def _found_room(self, number: int, watched: _Watched, replica: Replica) -> ReplicaResized | None:
        if not watched.waits:
            return None
        watched.waits = False
        return ReplicaResized(number, watched.generation, replica.num_ranks, "there is room for it again")

    @staticmethod
    def _wait(number: int, watched: _Watched, reason: str) -> ReplicaResized | None:
        if watched.waits:
            return None
        watched.waits = True
        return ReplicaResized(number, watched.generation, 0, reason)

    def _resize(self, number: int, ranks: int) -> None:
        if ranks < self._layout.ranks:
            self._sizes[number] = ranks
        else:
            self._sizes.pop(number, None)

    def _most_ranks(self, others: list[Replica], ground: Ground) -> tuple[int, str]:
        """As many as have room beside the other replicas, and why not more."""
        needs = self._needs = self._needs or self._ask_needs()
        whole = needs.of(self._layout.ranks)
        assert whole is not None
        held = [(node, needs.of(other.num_ranks) or whole) for other in others for node in other.places()]
        rooms, apart = room_left(ground.rooms, held), self._cluster.spread
        ranks = most_ranks(rooms, needs.of, self._layout.ranks, apart=apart)
        places = min(num_places(rooms, whole, apart=apart), self._layout.ranks)
        return ranks, needs.why_not(self._layout.ranks, places, ranks)
