"""A placement by measured loads, if it is worth moving experts for it. Pure.

L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

from workers.parallel.loads import ExpertLoads
from workers.parallel.placement import Placement, Topology, round_robin
from workers.parallel.planner import plan
from workers.parallel.prediction import expected_traffic, overall_imbalance, rank_loads

WORTH_MOVING = 0.99  # of round-robin's heaviest rank, or rows across nodes, that a plan must not exceed


def place_by_loads(loads: ExpertLoads, topology: Topology, slots_per_rank: int) -> Placement:
    """Where experts go by these loads; round-robin over as many slots where a plan is hardly better.

    That is: where it makes neither the heaviest rank lighter nor the rows across nodes fewer by a hundredth.
    """
    dealt = round_robin(loads.layers, loads.num_experts, topology.num_ranks, slots_per_rank)
    planned = plan(loads.counts, topology, slots_per_rank, layers=loads.layers, coactivations=loads.coactivations)
    if predicted_balance(planned, loads) <= WORTH_MOVING * predicted_balance(dealt, loads):
        return planned
    across = [expected_traffic(placement, topology, loads.counts).across for placement in (planned, dealt)]
    return planned if across[0] < WORTH_MOVING * across[1] else dealt


def predicted_balance(placement: Placement, loads: ExpertLoads) -> float:
    """The heaviest rank over the mean, over all layers: `overall_imbalance`."""
    return overall_imbalance(rank_loads(placement, loads.counts))
