"""A placement says which rank holds which experts, travels as JSON, and refuses to lose one."""

from __future__ import annotations

import json

import pytest

from workers.parallel.placement import Placement, Topology, round_robin


def test_round_robin_deals_experts_out_in_turn() -> None:
    placement = round_robin([1, 3], num_experts=5, num_ranks=2)
    assert placement.slots[0] == ((0, 2, 4), (1, 3))
    assert placement.held(3, 1) == (1, 3)
    assert placement.held_by(0, 4) == ((), (0, 2, 4), (), (0, 2, 4))


def test_spare_slots_are_dealt_out_so_that_replicas_land_elsewhere() -> None:
    placement = round_robin([0], num_experts=3, num_ranks=2, slots_per_rank=2)
    assert placement.slots[0] == ((0, 2), (1,))  # the fourth slot's turn is at expert 1 again
    placement = round_robin([0], num_experts=4, num_ranks=2, slots_per_rank=3)
    assert placement.slots[0] == ((0, 2, 1), (1, 3, 2))


def test_no_rank_holds_an_expert_twice() -> None:
    placement = round_robin([0], num_experts=2, num_ranks=4, slots_per_rank=2)
    assert all(len(set(held)) == len(held) for held in placement.slots[0])


def test_ranks_beyond_the_experts_hold_none() -> None:
    assert round_robin([0], num_experts=2, num_ranks=3).slots[0] == ((0,), (1,), ())


def test_a_placement_survives_json() -> None:
    placement = Placement(num_experts=2, layers=(1, 12), slots=(((0, 1), ()), ((1,), (1, 0))))
    assert Placement.from_json(json.loads(json.dumps(placement.to_json()))) == placement


@pytest.mark.parametrize(
    ("slots", "says"),
    [
        ((((0,), (0,)),), r"layer 7: experts \[1\]"),
        ((((0, 1), (2,)),), r"layer 7: experts \[2\]"),
        ((((0, 0), (1,)),), "rank 0 holds an expert twice"),
        ((), "slots for each"),
    ],
)
def test_a_placement_that_loses_or_invents_an_expert_is_refused(
    slots: tuple[tuple[tuple[int, ...], ...], ...], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Placement(num_experts=2, layers=(7,), slots=slots)


@pytest.mark.parametrize("document", [{}, {"num_experts": 2, "layers": [[0, 1]]}, {"num_experts": 1, "layers": None}])
def test_another_document_is_not_taken_for_a_placement(document: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a placement"):
        Placement.from_json(document)


def test_experts_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match="each needs at least 3"):
        round_robin([0], num_experts=5, num_ranks=2, slots_per_rank=2)


def test_a_topology_numbers_nodes_as_they_appear() -> None:
    topology = Topology.of(["b", "b", "a", "b"])
    assert topology == Topology((0, 0, 1, 0))
    assert (topology.num_ranks, topology.num_nodes) == (4, 2)
    assert Topology.even(4, 2).node_of == (0, 0, 1, 1)
    with pytest.raises(ValueError, match="evenly"):
        Topology.even(5, 2)
