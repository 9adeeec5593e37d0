"""All layers' copies while they are being placed. L layers, E experts, R ranks, N nodes, P copies of all experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.parallel.placement import Topology

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class Draft:
    """Invariant: no rank holds an expert twice. A copy with rank -1 found no place, and its expert has others."""

    expert: Ints  # [L, P]
    weight: Floats  # [L, P] an equal part of the expert's load
    rank: Ints  # [L, P]

    def busy(self, num_ranks: int) -> Floats:
        """[L, R]: the load of each rank's copies."""
        found = np.zeros((len(self.rank), num_ranks))
        for busy, rank, weight in zip(found, self.rank, self.weight, strict=True):
            busy += np.bincount(rank[rank >= 0], weights=weight[rank >= 0], minlength=num_ranks)
        return found

    def held(self, num_ranks: int, num_experts: int) -> NDArray[np.bool_]:
        """[L, R, E]: which rank holds what."""
        found = np.zeros((len(self.rank), num_ranks + 1, num_experts), dtype=bool)
        found[np.arange(len(self.rank))[:, None], self.rank, self.expert] = True  # -1 is the row too many
        return found[:, :num_ranks]

    def slots(self, layer: int, num_ranks: int) -> tuple[tuple[int, ...], ...]:
        """By rank, the experts it holds, ascending."""
        ranks: list[list[int]] = [[] for _ in range(num_ranks)]
        for rank, expert in zip(self.rank[layer].tolist(), self.expert[layer].tolist(), strict=True):
            if rank >= 0:
                ranks[rank].append(expert)
        return tuple(tuple(sorted(held)) for held in ranks)


def replicate(loads: Floats, num_copies: int, most: int) -> Draft:
    """loads [L, E] -> every expert once and the busiest again until there are `num_copies`, `most` of one at most.

    The next copy is always of the expert whose copies are the busiest, so that the busiest copy is as light as can be.
    Copies are in the order in which to place them: the busiest first, all of an expert in a row.
    """
    layers, (num_layers, num_experts) = np.arange(len(loads)), loads.shape
    counts = np.ones(loads.shape, dtype=np.int64)
    each = loads.copy()  # [L, E] of one copy; out of reach for an expert with no more to come
    if most == 1:
        each[:] = -1.0
    for _ in range(num_copies - num_experts):
        busiest = each.argmax(axis=1)
        counts[layers, busiest] += 1
        count = counts[layers, busiest]
        each[layers, busiest] = np.where(count < most, loads[layers, busiest] / count, -1.0)
    expert = np.repeat(np.tile(np.arange(num_experts), num_layers), counts.ravel()).reshape(num_layers, num_copies)
    whole = np.take_along_axis(loads, expert, axis=1)
    weight = whole / np.take_along_axis(counts, expert, axis=1)
    order = np.lexsort((expert, -whole, -weight), axis=1)
    expert, weight = np.take_along_axis(expert, order, axis=1), np.take_along_axis(weight, order, axis=1)
    return Draft(expert=expert, weight=weight, rank=np.full(expert.shape, -1, dtype=np.int64))


def pack(draft: Draft, num_experts: int, topology: Topology, slots_per_rank: int) -> None:
    """Give each copy, in order, to the least busy rank with a free slot on the nodes with the fewest copies of it."""
    layers, num_ranks, node_of = np.arange(len(draft.rank)), topology.num_ranks, np.asarray(topology.node_of)
    busy = np.zeros((len(layers), num_ranks))
    free = np.full((len(layers), num_ranks), slots_per_rank)
    blocked = np.zeros((num_experts, len(layers), num_ranks), dtype=bool)  # by a copy, or by having no slot left
    on_node = np.zeros((len(layers), num_experts, topology.num_nodes))
    further = 2 * draft.weight.sum(axis=1, keepdims=True)  # more than any rank's load
    for copy in range(draft.rank.shape[1]):
        expert, weight = draft.expert[:, copy], draft.weight[:, copy]
        cost = busy + further * on_node[layers, expert][:, node_of] if topology.num_nodes > 1 else busy
        cost = np.where((free > 0) & ~blocked[expert, layers], cost, np.inf)
        rank = cost.argmin(axis=1)
        fits = np.isfinite(cost[layers, rank])
        draft.rank[:, copy] = np.where(fits, rank, -1)
        blocked[expert, layers, rank] |= fits
        busy[layers, rank] += np.where(fits, weight, 0.0)
        free[layers, rank] -= fits
        on_node[layers, expert, node_of[rank]] += fits
    _reweigh(draft)


def _reweigh(draft: Draft) -> None:
    """Where a copy found no place, the expert's others take its part."""
    for layer in np.flatnonzero((draft.rank < 0).any(axis=1)):
        placed, expert, weight = draft.rank[layer] >= 0, draft.expert[layer], draft.weight[layer]
        meant, found = np.bincount(expert), np.bincount(expert[placed], minlength=expert.max() + 1)
        draft.weight[layer] = np.where(placed, weight * meant[expert] / np.maximum(found[expert], 1), 0.0)
