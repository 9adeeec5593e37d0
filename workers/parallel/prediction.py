"""What a placement will do, before anything runs: how busy each rank is, and what travels. Pure.

Rows are hidden states on their way to experts. L layers, E experts, R ranks, N nodes, T tokens, k experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from workers.parallel.copies import copies_of, turns
from workers.parallel.placement import Placement, Topology

Array = NDArray[np.float64] | NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Rows that stay on their rank, that go to another rank of the node, and that go to another node, one way."""

    own: float
    within: float
    across: float

    def bytes_moved(self, row_bytes: int) -> tuple[int, int]:
        """Bytes (within nodes, across nodes), there and back, when each row has its answer."""
        return round(2 * self.within * row_bytes), round(2 * self.across * row_bytes)


def rank_loads(placement: Placement, loads: Array) -> NDArray[np.float64]:
    """loads [L, E] -> [L, R], an expert's load in equal parts on all of its copies, as `copies` shares tokens out."""
    _check(placement, len(loads), np.shape(loads)[1])
    found = np.zeros((len(loads), placement.num_ranks))
    for i, ranks in enumerate(placement.slots):
        rank_of = np.repeat(np.arange(len(ranks)), [len(held) for held in ranks])
        expert_of = np.array([expert for held in ranks for expert in held], dtype=np.int64)
        share = np.asarray(loads[i], dtype=np.float64) / np.bincount(expert_of, minlength=placement.num_experts)
        found[i] = np.bincount(rank_of, weights=share[expert_of], minlength=len(ranks))
    return found


def imbalance(busy: Array) -> NDArray[np.float64]:
    """busy [L, R] rows by layer and rank -> [L]: the heaviest rank over the mean, 1 where there is nothing to do."""
    mean = np.mean(busy, axis=1)
    over: NDArray[np.float64] = np.divide(np.max(busy, axis=1), mean, out=np.ones(len(mean)), where=mean > 0)
    return over


def overall_imbalance(busy: Array) -> float:
    """busy [L, R] -> the time that ranks take who wait for the heaviest in every layer, over what it would be if none
    were heavier than another."""
    mean = float(np.mean(busy, axis=1).sum())
    return float(np.max(busy, axis=1).sum()) / mean if mean > 0 else 1.0


def expected_traffic(placement: Placement, topology: Topology, loads: Array) -> Traffic:
    """loads [L, E] from ranks that are equally busy -> rows of all layers, one a pair of token and expert."""
    _check(placement, len(loads), np.shape(loads)[1])
    node_of = np.asarray(topology.node_of)
    ranks_on = np.bincount(node_of)  # [N]
    own = near = 0.0
    for layer, load in zip(placement.layers, np.asarray(loads, dtype=np.float64), strict=True):
        copies = copies_of(placement, topology, layer)
        flow = copies.shares * load[:, None] * (ranks_on / topology.num_ranks)[:, None, None]  # [N, E, M] rows
        on_node = node_of[copies.ranks] == np.arange(topology.num_nodes)[:, None, None]  # [N, E, M]
        near += float(flow[on_node].sum())
        own += float((flow * on_node / ranks_on[:, None, None]).sum())  # each of the node's ranks asks as often
    return Traffic(own=own, within=near - own, across=max(0.0, float(np.sum(loads)) - near))


def routed(
    placement: Placement,
    topology: Topology,
    choices: Sequence[NDArray[np.int64]],
    *,
    once_per: Literal["pair", "rank", "node"] = "pair",
) -> tuple[Traffic, NDArray[np.int64]]:
    """Send recorded choices, [T, k] a layer, through the gang, token t from rank t mod R -> traffic, busy [L, R] pairs.

    `once_per`: a token's row travels once for each expert it chose ("pair", what the dispatcher does), once to each
    rank that holds any of them, or once to each node, where it is handed on. `busy` is the same for all three.
    """
    _check(placement, len(choices), placement.num_experts)
    node_of, num_ranks = np.asarray(topology.node_of), topology.num_ranks
    busy = np.zeros((len(choices), num_ranks), dtype=np.int64)
    sums = np.zeros(3)  # own, within, across
    for i, (layer, chosen) in enumerate(zip(placement.layers, choices, strict=True)):
        tokens = np.arange(len(chosen))
        source = tokens % num_ranks  # [T]
        u = np.empty(len(chosen))
        for rank in range(num_ranks):
            u[rank::num_ranks] = turns(len(u[rank::num_ranks]), rank)
        copies = copies_of(placement, topology, layer)
        which = (u[:, None, None] >= copies.bounds[node_of[source][:, None], chosen]).sum(axis=2)  # [T, k]
        target = copies.ranks[chosen, which]  # [T, k]
        busy[i] = np.bincount(target.ravel(), minlength=num_ranks)
        sums += _rows(source, target, node_of, once_per)
    own, within, across = map(float, sums)
    return Traffic(own=own, within=within, across=across), busy


def _rows(
    source: NDArray[np.int64], target: NDArray[np.int64], node_of: NDArray[np.int64], once_per: str
) -> NDArray[np.int64]:
    """source [T], target [T, k] ranks -> rows that stay, that travel within nodes, that travel across."""
    first = np.ones_like(target, dtype=bool) if once_per == "pair" else _first_of_each(target)
    own = target == source[:, None]
    far = node_of[target] != node_of[source][:, None]
    across = far & (first if once_per != "node" else _first_of_each(node_of[target]))
    return np.array([(own & first).sum(), (~own & first).sum() - across.sum(), across.sum()])


def _first_of_each(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """values [T, k] -> which are the first of their value in their row."""
    k = values.shape[1]
    equal = values[:, :, None] == values[:, None, :]  # [T, k, k]
    repeated: NDArray[np.bool_] = (equal & np.tri(k, k=-1, dtype=bool)).any(axis=2)
    return ~repeated


def _check(placement: Placement, num_layers: int, num_experts: int) -> None:
    if (len(placement.layers), placement.num_experts) != (num_layers, num_experts):
        raise ValueError(
            f"a placement of {len(placement.layers)} layers of {placement.num_experts} experts "
            f"for {num_layers} layers of {num_experts}"
        )
