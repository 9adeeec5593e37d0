"""Which copy of an expert a rank asks, where several ranks hold one: those of its own node before others. Pure.

If all ranks are equally busy, each of an expert's m copies gets one m-th of its tokens, and as many of them as that
allows stay on the node they come from. Example, two nodes with two ranks each, two copies on the first node, one on the
second, so that each copy is to have 1/3 of all tokens: the second node's ranks, from which half of the tokens come,
send 2/3 of them to their own node's copy and 1/6 to each of the others; the first node's send half to each of theirs.

R ranks, N nodes, E experts, M copies of an expert at most, S slots of all ranks together, numbered rank by rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.parallel.placement import Placement, Topology

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True)
class Copies:
    """One layer's copies. `slots` [E, M] int64, filled up with an expert's first copy; `ranks` [E, M] that hold them.

    `bounds` [N, E, M]: of a number u in [0, 1), a rank on node n takes the copy with as many bounds at or below u:
    `(u >= bounds[n, expert]).sum()`. A place that is only filled up is never taken.
    """

    slots: NDArray[np.int64]
    ranks: NDArray[np.int64]
    bounds: NDArray[np.float64]

    @property
    def shares(self) -> NDArray[np.float64]:
        """[N, E, M]: the share of its tokens for an expert that a rank on a node sends to each copy."""
        return np.diff(self.bounds, axis=2, prepend=0.0)


def turns(num_tokens: int, rank: int) -> NDArray[np.float64]:
    """The numbers u [T] by which a rank's tokens take their copies: evenly spread, however few they are."""
    return np.mod(np.arange(rank + 1, rank + 1 + num_tokens, dtype=np.float64) * GOLDEN, 1.0)


def copies_of(placement: Placement, topology: Topology, layer: int) -> Copies:
    """The copies of decoder layer `layer`. ValueError when the placement is for another number of ranks."""
    if placement.num_ranks != topology.num_ranks:
        raise ValueError(f"a placement over {placement.num_ranks} ranks on a topology of {topology.num_ranks}")
    held = placement.slots[placement.layers.index(layer)]
    rank_of = np.repeat(np.arange(len(held)), [len(experts) for experts in held])  # [S]
    expert_of = np.array([expert for experts in held for expert in experts], dtype=np.int64)  # [S]
    order = np.argsort(expert_of, kind="stable")
    num_copies = np.bincount(expert_of, minlength=placement.num_experts)  # [E]
    first = np.cumsum(num_copies) - num_copies
    place = np.arange(num_copies.max())  # [M]
    real = place < num_copies[:, None]  # [E, M]
    slots = order[np.where(real, first[:, None] + place, first[:, None])]  # [E, M]
    ranks = rank_of[slots]
    bounds = np.cumsum(_shares(np.asarray(topology.node_of)[ranks], real, topology), axis=2)
    bounds[:, np.arange(len(bounds[0])), num_copies - 1] = 1.0  # rounding leaves no gap at the end
    return Copies(slots=slots, ranks=ranks, bounds=np.where(real, bounds, 1.0))


def _shares(node: NDArray[np.int64], real: NDArray[np.bool_], topology: Topology) -> NDArray[np.float64]:
    """node [E, M] of each copy, real [E, M] -> the share that each node's ranks give it, [N, E, M]."""
    num_nodes = topology.num_nodes
    supply = np.bincount(topology.node_of, minlength=num_nodes) / topology.num_ranks  # [N] of all tokens
    here = (node == np.arange(num_nodes)[:, None, None]) & real  # [N, E, M]
    on_node = here.sum(axis=2)  # [N, E]
    room = on_node / real.sum(axis=1)  # [N, E] of an expert's tokens
    local = np.minimum(1.0, room / supply[:, None])  # [N, E]
    spare = np.maximum(0.0, room - supply[:, None])
    total = spare.sum(axis=0)
    spare = np.divide(spare, total, out=np.zeros_like(spare), where=total > 0) / np.maximum(on_node, 1)  # [N, E] a copy
    near = here * (local / np.maximum(on_node, 1))[:, :, None]
    spare_of = spare[node, np.arange(len(node))[:, None]] * real  # [E, M]
    shares: NDArray[np.float64] = near + (1.0 - local)[:, :, None] * spare_of
    return shares
