"""Bring experts that tokens choose together to one node, by exchanging copies of like loads. Pure.

L layers, E experts, R ranks, N nodes, P copies of all experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from workers.parallel.draft import Draft, Floats
from workers.parallel.placement import Topology

_SWEEPS = 2  # over all copies; a third finds next to nothing
_PAIRS = 1_000_000  # of copies, in the layers that are worked on side by side


def bring_together(draft: Draft, attraction: Floats, topology: Topology, limit: Floats) -> None:
    """Exchange copies between nodes as long as that brings more attraction [L, E, E], symmetric, onto single nodes.

    attraction[l, e, f] is what it is worth that a copy of e and one of f share a node (below zero: that they don't).
    No rank becomes busier than `limit` [L]. Each copy in turn, in all layers side by side, changes places with the one
    that gains the most: linear in layers, quadratic in copies.
    """
    num_layers, num_copies = draft.rank.shape
    chunk = max(1, _PAIRS // num_copies**2)
    for start in range(0, num_layers, chunk):
        part = slice(start, start + chunk)
        rank = draft.rank[part]  # a view: what moves, moves in the draft
        layers = Draft(expert=draft.expert[part], weight=draft.weight[part], rank=rank)
        _Exchange(layers, attraction[part], topology, limit[part]).run()


class _Exchange:
    """Invariants: worth[l, n, p] is the attraction between copy p and all others on node n, if p were there;
    busy and held are the draft's."""

    def __init__(self, draft: Draft, attraction: Floats, topology: Topology, limit: Floats) -> None:
        self.expert, self.weight, self.rank, self.limit = draft.expert, draft.weight, draft.rank, limit
        self.rows = np.arange(len(limit))
        self.placed = draft.rank >= 0
        self.node = np.asarray(topology.node_of)[draft.rank]  # [L, P]
        self.busy = draft.busy(topology.num_ranks)
        self.held = draft.held(topology.num_ranks, attraction.shape[1])
        between = attraction[self.rows[:, None, None], draft.expert[:, :, None], draft.expert[:, None, :]]
        between *= self.placed[:, :, None] & self.placed[:, None, :]
        between[:, np.arange(between.shape[1]), np.arange(between.shape[1])] = 0.0
        self.between = between  # [L, P, P]
        self.worth = np.stack(
            [np.einsum("lpq,lq->lp", between, self.node == node) for node in range(topology.num_nodes)], axis=1
        )  # [L, N, P]
        self.least = 1e-9 * np.abs(between).max(axis=(1, 2), initial=0.0)  # a gain below is rounding

    def run(self) -> None:
        for _ in range(_SWEEPS):
            moved = [self._exchange(copy) for copy in range(self.rank.shape[1])]
            if not any(moved):
                return

    def _exchange(self, copy: int) -> bool:
        """Put a copy, in each layer, in place of the one with which it gains the most; whether any moved."""
        rank, node = self.rank[:, copy], self.node[:, copy]
        heavier = self.weight - self.weight[:, copy, None]  # [L, P] what this copy's rank takes on
        gain = np.take_along_axis(self.worth[:, :, copy], self.node, axis=1)  # of this copy where the other is
        gain -= self.worth[self.rows, node, copy][:, None]
        gain += self.worth[self.rows, node]  # of the other where this copy is
        gain -= np.take_along_axis(self.worth, self.node[:, None, :], axis=1)[:, 0]
        gain -= 2 * self.between[:, copy]
        gain[~self._possible(copy, heavier)] = -np.inf
        other = gain.argmax(axis=1)
        (now,) = np.nonzero(gain[self.rows, other] > self.least)
        other = other[now]
        rank, node = rank[now], node[now]
        their_rank, their_node = self.rank[now, other], self.node[now, other]
        change = self.between[now, other] - self.between[now, copy]
        self.worth[now, node] += change
        self.worth[now, their_node] -= change
        self.busy[now, rank] += heavier[now, other]
        self.busy[now, their_rank] -= heavier[now, other]
        expert, theirs = self.expert[now, copy], self.expert[now, other]
        self.held[now, rank, expert] = self.held[now, their_rank, theirs] = False
        self.held[now, rank, theirs] = self.held[now, their_rank, expert] = True
        self.rank[now, copy], self.rank[now, other] = their_rank, rank
        self.node[now, copy], self.node[now, other] = their_node, node
        return bool(len(now))

    def _possible(self, copy: int, heavier: Floats) -> NDArray[np.bool_]:
        """[L, P]: with which copies this one may change places."""
        rank, expert, limit = self.rank[:, copy], self.expert[:, copy], self.limit[:, None]
        possible: NDArray[np.bool_] = self.node != self.node[:, copy, None]
        possible &= self.placed & self.placed[:, copy, None]
        possible &= heavier <= limit - self.busy[self.rows, rank][:, None]
        possible &= np.take_along_axis(self.busy, self.rank, axis=1) - heavier <= limit
        possible &= ~np.take_along_axis(self.held[self.rows, :, expert], self.rank, axis=1)
        possible &= ~np.take_along_axis(self.held[self.rows, rank], self.expert, axis=1)
        return possible
