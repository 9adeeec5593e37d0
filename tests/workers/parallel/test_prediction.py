"""What is predicted of a placement is what happens when tokens are sent through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.workers.parallel.holders import holders
from workers.parallel.copies import copies_of, turns
from workers.parallel.placement import Placement, Topology, round_robin
from workers.parallel.planner import plan
from workers.parallel.prediction import Traffic, expected_traffic, imbalance, overall_imbalance, rank_loads, routed

ONE_LAYER = Placement(num_experts=3, layers=(4,), slots=(((0, 1), (0,), (0, 2)),))


@st.composite
def placements(draw: st.DrawFn) -> tuple[Placement, Topology]:
    """Any placement of one layer, on nodes of any sizes."""
    ranks, experts = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    held = [set(draw(st.sets(st.integers(0, experts - 1)))) for _ in range(ranks)]
    for expert in set(range(experts)).difference(*held):
        held[draw(st.integers(0, ranks - 1))].add(expert)
    topology = Topology.of(draw(st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks)))
    slots = (tuple(tuple(sorted(experts)) for experts in held),)
    return Placement(num_experts=experts, layers=(0,), slots=slots), topology


def test_an_experts_load_is_shared_by_its_copies() -> None:
    busy = rank_loads(ONE_LAYER, np.array([[9, 4, 2]]))
    assert busy.tolist() == [[7, 3, 5]]
    assert imbalance(busy).tolist() == [7 / 5]


def test_layers_wait_for_their_heaviest_rank_each() -> None:
    assert overall_imbalance(np.array([[4, 0], [0, 4], [1, 1]])) == pytest.approx(9 / 5)
    assert imbalance(np.zeros((1, 3))).tolist() == [1.0]
    assert overall_imbalance(np.zeros((1, 3))) == 1.0


def test_the_worked_example_of_uneven_copies_holds() -> None:
    placement = Placement(num_experts=1, layers=(0,), slots=(((0,), (0,), (0,), ()),))
    copies = copies_of(placement, Topology((0, 0, 1, 1)), 0)
    np.testing.assert_allclose(copies.shares[0], [[1 / 2, 1 / 2, 0]])
    np.testing.assert_allclose(copies.shares[1], [[1 / 6, 1 / 6, 2 / 3]])


@given(placements())
def test_copies_get_equal_parts_and_the_nearest_get_all_they_may(case: tuple[Placement, Topology]) -> None:
    placement, topology = case
    copies = copies_of(placement, topology, 0)
    node_of = np.asarray(topology.node_of)
    supply = np.bincount(node_of) / topology.num_ranks
    np.testing.assert_allclose(copies.shares.sum(axis=2), 1.0)
    for expert, held in enumerate(holders(placement, 0)):
        m = len(held)
        np.testing.assert_allclose(supply @ copies.shares[:, expert, :m], 1 / m)
        assert copies.ranks[expert, :m].tolist() == [rank for rank, _ in held]
        nodes = node_of[copies.ranks[expert, :m]]
        for node in range(topology.num_nodes):
            stays = copies.shares[node, expert, :m][nodes == node].sum()
            assert stays == pytest.approx(min(1.0, (nodes == node).sum() / m / supply[node]))


@given(placements(), st.lists(st.floats(0, 1, exclude_max=True), min_size=1))
def test_a_turn_always_takes_a_rank_that_holds_the_expert(case: tuple[Placement, Topology], turn: list[float]) -> None:
    placement, topology = case
    copies = copies_of(placement, topology, 0)
    for node in range(topology.num_nodes):
        for expert in range(placement.num_experts):
            which = (np.array(turn)[:, None] >= copies.bounds[node, expert]).sum(axis=1)
            assert all(expert in placement.held(0, rank) for rank in copies.ranks[expert, which])
            assert (which < len(holders(placement, 0)[expert])).all()


def test_slots_are_numbered_rank_by_rank() -> None:
    copies = copies_of(ONE_LAYER, Topology.even(3), 4)
    assert copies.slots.tolist() == [[0, 2, 3], [1, 1, 1], [4, 4, 4]]


def test_turns_of_few_tokens_are_spread() -> None:
    for tokens in (8, 64):
        counts = np.histogram(turns(tokens, rank=5), bins=4, range=(0, 1))[0]
        assert abs(counts - tokens / 4).max() <= 1


def test_rows_are_counted_as_they_travel() -> None:
    topology = Topology((0, 0, 1, 1))
    placement = round_robin([0], num_experts=8, num_ranks=4)  # expert e on rank e mod 4
    choices = [np.array([[0, 1, 2, 3, 6, 7]])]  # one token, of rank 0
    assert routed(placement, topology, choices)[0] == Traffic(own=1, within=1, across=4)
    assert routed(placement, topology, choices, once_per="rank")[0] == Traffic(own=1, within=1, across=2)
    assert routed(placement, topology, choices, once_per="node")[0] == Traffic(own=1, within=2, across=1)
    assert routed(placement, topology, choices)[1].tolist() == [[1, 1, 2, 2]]
    assert Traffic(own=1, within=1, across=4).bytes_moved(10) == (20, 80)


def test_prediction_agrees_with_what_recorded_tokens_do(domain_choices: Callable[..., Any]) -> None:
    choices: list[NDArray[np.int64]] = domain_choices(layers=3, experts=32, top_k=4, tokens=6000, domains=4)
    loads = np.stack([np.bincount(chosen.ravel(), minlength=32) for chosen in choices])
    topology = Topology((0, 0, 0, 1, 1, 1, 2, 2))
    for placement in (plan(loads, topology, 6), round_robin(range(3), 32, 8)):
        traffic, busy = routed(placement, topology, choices)
        expected = expected_traffic(placement, topology, loads)
        for name in ("own", "within", "across"):
            assert getattr(traffic, name) == pytest.approx(getattr(expected, name), rel=0.05)
        np.testing.assert_allclose(imbalance(busy), imbalance(rank_loads(placement, loads)), rtol=0.05)
        assert busy.sum() == loads.sum()


def test_a_placement_for_another_model_or_gang_is_refused() -> None:
    with pytest.raises(ValueError, match="1 layers of 3 experts for 2 layers of 3"):
        rank_loads(ONE_LAYER, np.ones((2, 3)))
    with pytest.raises(ValueError, match="over 3 ranks on a topology of 4"):
        copies_of(ONE_LAYER, Topology.even(4), 4)
