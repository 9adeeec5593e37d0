"""DeepSeek's load balancer, written from its published description, to compare our planner with.

github.com/deepseek-ai/EPLB and section 3.4 of the DeepSeek-V3 report (arXiv 2412.19437). Hierarchical, for
group-limited routing: groups of experts are packed to nodes, experts are replicated within their node, copies are
packed to its ranks. Global, where groups don't divide: replicate and pack as if all were one node. Both packings are
greedy: the heaviest first, to the lightest pack with room; a rank may hold an expert twice.

L layers, E experts, G groups, N nodes, R ranks, S slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def balanced_packing(weights: Floats, num_packs: int) -> Ints:
    """weights [L, n] -> the pack of each, as many in every pack."""
    num_layers, num_items = weights.shape
    layers, pack_of = np.arange(num_layers), np.empty(weights.shape, dtype=np.int64)
    load, count = np.zeros((num_layers, num_packs)), np.zeros((num_layers, num_packs), dtype=np.int64)
    for item in np.argsort(-weights, axis=1, kind="stable").T:
        pack = np.where(count < num_items // num_packs, load, np.inf).argmin(axis=1)
        pack_of[layers, item] = pack
        load[layers, pack] += weights[layers, item]
        count[layers, pack] += 1
    return pack_of


def replicate_experts(weights: Floats, num_copies: int) -> Ints:
    """weights [L, n] -> how many copies of each, the next always of the one whose copies are the heaviest."""
    layers, counts = np.arange(len(weights)), np.ones(weights.shape, dtype=np.int64)
    for _ in range(num_copies - weights.shape[1]):
        counts[layers, (weights / counts).argmax(axis=1)] += 1
    return counts


def eplb(loads: Floats, *, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int) -> Floats:
    """loads [L, E] -> what each rank has to do, [L, R], an expert's load in equal parts on its copies."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    num_layers, num_experts = loads.shape
    groups = loads.reshape(num_layers, num_groups, -1).sum(axis=2)
    node_of = balanced_packing(groups, num_nodes).repeat(num_experts // num_groups, axis=1)  # [L, E]
    by_node = np.argsort(node_of, axis=1, kind="stable")
    within = np.take_along_axis(loads, by_node, axis=1).reshape(num_layers * num_nodes, -1)  # [L * N, E / N]
    counts = replicate_experts(within, num_slots // num_nodes)
    copies = (within / counts).ravel().repeat(counts.ravel()).reshape(len(within), -1)  # [L * N, S / N]
    rank_of = balanced_packing(copies, num_ranks // num_nodes)
    rank_of += num_ranks // num_nodes * np.arange(len(within))[:, None]
    loads_of = np.bincount(rank_of.ravel(), weights=copies.ravel()).astype(np.float64)
    return loads_of.reshape(num_layers, num_ranks)
