"""Who holds an expert, looked up in the slowest way."""

from __future__ import annotations

from workers.parallel.placement import Placement


def holders(placement: Placement, layer: int) -> list[list[tuple[int, int]]]:
    """By expert of a decoder layer, the (rank, slot) of each of its replicas, in ascending order."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(placement.num_experts)]
    for rank in range(placement.num_ranks):
        for slot, expert in enumerate(placement.held(layer, rank)):
            found[expert].append((rank, slot))
    return found
