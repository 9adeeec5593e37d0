"""Measured loads move experts where that is worth reading them again."""

from __future__ import annotations

import numpy as np
import pytest

from workers.parallel.loads import ExpertLoads
from workers.parallel.measured import place_by_loads, predicted_balance
from workers.parallel.placement import Topology, round_robin


def chosen(choices: list[list[int]], experts: int) -> ExpertLoads:
    loads = ExpertLoads(layers=(3,), num_experts=experts)
    loads.add(3, np.array(choices))
    return loads


def test_hot_experts_that_lie_together_are_parted() -> None:
    loads = chosen([[0, 2]] * 90 + [[1, 3]] * 10, 4)
    dealt, placed = round_robin((3,), 4, 2, 2), place_by_loads(loads, Topology.even(2), 2)
    assert predicted_balance(dealt, loads) == pytest.approx(1.8)
    assert predicted_balance(placed, loads) == pytest.approx(1.0)


def test_nothing_moves_where_little_is_won() -> None:
    loads = chosen([[0, 2]] * 50 + [[1, 3]] * 50, 4)
    assert place_by_loads(loads, Topology.even(2), 2) == round_robin((3,), 4, 2, 2)


def test_experts_move_to_keep_rows_on_a_node_where_all_ranks_are_as_busy_before() -> None:
    """Two pairs that are chosen together, which round-robin parts: with a copy of each on each node nothing crosses."""
    loads, topology = chosen([[0, 1]] * 50 + [[2, 3]] * 50, 4), Topology.even(4, 2)
    placed = place_by_loads(loads, topology, 2)
    for node in (0, 1):
        held = {expert for rank in (2 * node, 2 * node + 1) for expert in placed.slots[0][rank]}
        assert held == {0, 1, 2, 3}
