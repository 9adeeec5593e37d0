"""Loads add up over steps, ranks and JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from workers.parallel.loads import ExpertLoads


def test_tokens_are_counted_by_expert_and_by_pair() -> None:
    loads = ExpertLoads(layers=[1, 5], num_experts=4)
    loads.add(5, np.array([[0, 1], [1, 3], [0, 1]]))
    loads.add(5, np.array([[2, 3]]))
    loads.add(1, np.empty((0, 2), dtype=np.int64))
    assert loads.counts.tolist() == [[0, 0, 0, 0], [2, 3, 1, 2]]
    assert loads.coactivations[1].tolist() == [[0, 2, 0, 0], [2, 0, 0, 1], [0, 0, 0, 1], [0, 1, 1, 0]]
    assert not loads.coactivations[0].any()


def test_it_makes_no_difference_in_which_steps_and_ranks_tokens_came() -> None:
    choices = np.stack([np.random.default_rng(seed).permutation(6)[:3] for seed in range(5000)])
    whole, first, second = (ExpertLoads(layers=[0], num_experts=6) for _ in range(3))
    whole.add(0, choices)
    for part in np.split(choices[:3000], 30):
        first.add(0, part)
    second.add(0, choices[3000:])
    first.merge(second)
    assert np.array_equal(first.counts, whole.counts)
    assert np.array_equal(first.coactivations, whole.coactivations)
    assert whole.coactivations.sum() == 5000 * 3 * 2


def test_loads_survive_json() -> None:
    loads = ExpertLoads(layers=[0, 2], num_experts=5)
    loads.add(2, np.array([[0, 4], [1, 2], [1, 2]]))
    again = ExpertLoads.from_json(json.loads(json.dumps(loads.to_json())))
    assert (again.layers, again.num_experts) == ((0, 2), 5)
    assert np.array_equal(again.counts, loads.counts)
    assert np.array_equal(again.coactivations, loads.coactivations)


def test_what_does_not_add_up_is_refused() -> None:
    loads = ExpertLoads(layers=[0], num_experts=4)
    with pytest.raises(ValueError, match="layer 3 has no experts"):
        loads.add(3, np.array([[0, 1]]))
    with pytest.raises(ValueError, match="don't add up"):
        loads.merge(ExpertLoads(layers=[0], num_experts=5))
    short = {"num_experts": 4, "layers": {"0": {"counts": [1, 2], "coactivations": []}}}
    for document in ({}, {"num_experts": 4, "layers": [0]}, short):
        with pytest.raises(ValueError, match="not expert loads"):
            ExpertLoads.from_json(document)
