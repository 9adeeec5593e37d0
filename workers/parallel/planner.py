"""Which experts to hold more than once, and where all of them go, from how much each has to do.

Pure and deterministic: numpy in, a `Placement` out. All layers are planned side by side, so that the work in Python is
one layer's and the rest is linear in layers. Three steps, in each layer for itself:

1. Spare slots go, one after the other, to the expert whose copies are the busiest.
2. Copies go, the busiest first, to the least busy rank with a free slot, on a node that has no copy of it yet.
3. With co-activations: copies change places where that brings experts together and keeps the balance (`locality`).

Against DeepSeek's EPLB (github.com/deepseek-ai/EPLB), which packs groups of experts to nodes and copies within them: a
group is not kept together whatever its load, so nodes are as balanced as ranks; copies lie on different nodes, so that
each node has its own; and no expert has as many copies as there are ranks if fewer balance better.

L layers, E experts, R ranks, N nodes, P copies of all experts together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.parallel.draft import Draft, Floats, pack, replicate
from workers.parallel.locality import bring_together
from workers.parallel.placement import Placement, Topology, check_room, round_robin
from workers.parallel.prediction import rank_loads

Array = NDArray[np.float64] | NDArray[np.int64]

_UNSEEN = 1e-9  # of a layer's mean load: what counts for an expert that no token of the sample chose
_MOST_COPIES = (1.0, 0.75, 0.5)  # of the ranks, for one expert: tried in turn where it balances badly
_GOOD = 1.01  # heaviest rank over mean with which there is nothing to look for
_ROOM = 1.02  # heaviest rank over mean that may come of bringing experts together


def plan(
    loads: Array,
    topology: Topology,
    slots_per_rank: int,
    *,
    layers: Sequence[int] | None = None,
    coactivations: Array | None = None,
) -> Placement:
    """loads [L, E] tokens by MoE layer and expert -> where each expert is held, hot ones more than once.

    `layers`: the decoder layer of each of the L (None: 0, 1, ...). `coactivations` [L, E, E], symmetric: tokens that
    chose both of two experts. In no layer is the heaviest rank heavier than round-robin's with as many slots.
    ValueError when the slots have no room for all experts, or a number is negative or not finite.
    """
    work = _checked(loads, "loads", ndim=2)
    num_layers, num_experts = work.shape
    check_room(num_experts, topology.num_ranks, slots_per_rank)
    mean = work.mean(axis=1, keepdims=True)
    work = np.where(mean > 0, work + _UNSEEN * mean, 1.0)
    draft = _balanced(work, topology, min(slots_per_rank, num_experts))
    if coactivations is not None and topology.num_nodes > 1:
        together = _checked(coactivations, "co-activations", ndim=3)
        if together.shape != (num_layers, num_experts, num_experts):
            raise ValueError(f"co-activations {together.shape} don't belong to loads {work.shape}")
        busy = draft.busy(topology.num_ranks)
        limit = np.maximum(busy.max(axis=1), _ROOM * busy.mean(axis=1))
        bring_together(draft, _attraction(work, together, draft, topology), topology, limit)
    return _placement(draft, work, topology, slots_per_rank, range(num_layers) if layers is None else layers)


def _checked(numbers: Array, name: str, ndim: int) -> Floats:
    array = np.asarray(numbers, dtype=np.float64)
    if array.ndim != ndim or not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(f"{name} have {ndim} dimensions, and each is finite and not negative")
    return array


def _balanced(loads: Floats, topology: Topology, slots_per_rank: int) -> Draft:
    """The best of a few numbers of copies that one expert may have, layer by layer."""
    (num_layers, num_experts), num_ranks = loads.shape, topology.num_ranks
    best: Draft | None = None
    todo, score = np.arange(num_layers), np.full(num_layers, np.inf)
    for share in _MOST_COPIES:
        most = max(1, int(share * num_ranks))
        num_copies = min(num_ranks * slots_per_rank, num_experts * num_ranks)
        if not len(todo) or num_copies > num_experts * most:
            break
        draft = replicate(loads[todo], num_copies, most)
        pack(draft, num_experts, topology, slots_per_rank)
        busy = draft.busy(num_ranks)
        found = busy.max(axis=1) / busy.mean(axis=1)
        if best is None:
            best = draft
        better = found < score[todo]
        for name in ("expert", "weight", "rank"):
            getattr(best, name)[todo[better]] = getattr(draft, name)[better]
        score[todo] = np.minimum(found, score[todo])
        todo = np.flatnonzero(score > _GOOD)
    assert best is not None, "with as many copies as ranks there is room"
    return best


def _attraction(loads: Floats, together: Floats, draft: Draft, topology: Topology) -> Floats:
    """[L, E, E]: about how many rows needn't cross if a copy of each lies on one node.

    Tokens that chose both, as far as they meet at these copies. Of k rows to k experts on one node k - 1 are saved: 2/k
    for each of the k (k - 1) / 2 pairs. Two copies of one expert belong on different nodes, where each keeps its own
    node's tokens.
    """
    counts = draft.held(topology.num_ranks, loads.shape[1]).sum(axis=1)  # [L, E]
    diagonal = np.arange(loads.shape[1])
    attraction: Floats = together / (counts[:, :, None] * counts[:, None, :])
    attraction[:, diagonal, diagonal] = 0.0
    top_k = 1.0 + together.sum(axis=(1, 2)) / loads.sum(axis=1)  # [L] each token of an expert has k - 1 others
    attraction *= (2 / top_k)[:, None, None]
    attraction[:, diagonal, diagonal] = -loads / topology.num_nodes
    return attraction


def _placement(
    draft: Draft, loads: Floats, topology: Topology, slots_per_rank: int, layers: Sequence[int]
) -> Placement:
    """The draft's layers, and round-robin's where by luck that is better balanced."""
    num_experts, num_ranks = loads.shape[1], topology.num_ranks
    dealt = round_robin(layers, num_experts, num_ranks, slots_per_rank)
    lucky = rank_loads(dealt, loads).max(axis=1) < draft.busy(num_ranks).max(axis=1)
    slots = tuple(dealt.slots[i] if lucky[i] else draft.slots(i, num_ranks) for i in range(len(loads)))
    return Placement(num_experts=num_experts, layers=tuple(layers), slots=slots)
