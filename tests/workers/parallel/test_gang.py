"""Ranks in processes of their own: what they exchange, that layout changes no answer, and what a death does to them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workers.parallel.placement import Placement, Topology, round_robin
from workers.parallel.prediction import expected_traffic, rank_loads

# Expert 1 is held three times and 4 twice; ranks have 3, 5 and 1 slots, in no order. Layer 2 is dense.
UNEVEN = Placement(
    num_experts=6,
    layers=(0, 1, 3),
    slots=(
        ((4, 0, 1), (5, 3, 1, 2, 4), (1,)),
        ((0, 1, 2), (3, 4, 5, 1), (1, 0)),
        ((), (0, 1, 2, 3, 4, 5), (3,)),
    ),
)


def test_rows_reach_their_experts_wherever_those_lie_and_however_often(gang: Callable[..., Any]) -> None:
    task = {"kind": "dispatched", "width": 16, "top_k": 3, "tokens": [50, 0, 7]}
    results = gang(task, UNEVEN).results()
    for result in results:
        for remote, local in result["pairs"]:
            assert torch.equal(remote, local)
        assert result["exchanges"] == 3 * len(UNEVEN.layers)
    for i, layer in enumerate(UNEVEN.layers):
        computed = [result["rows"][layer] for result in results]
        assert [len(slots) for slots in computed] == [len(held) for held in UNEVEN.slots[i]]
        assert sum(map(sum, computed)) == 3 * (50 + 0 + 7)
    hot = [results[0]["rows"][0][2], results[1]["rows"][0][2], results[2]["rows"][0][0]]
    assert min(hot) > 0.5 * max(hot), "a replicated expert's tokens are spread over its copies"
    for rank, result in enumerate(results):
        assert result["bytes_to"][rank] == 0
    assert results[0]["bytes_to"][1] == results[1]["bytes_to"][0], "rows there, and as many answers back"


def test_copies_on_the_own_node_are_asked_first_as_predicted(gang: Callable[..., Any]) -> None:
    tokens, topology = 300, Topology((0, 0, 1))
    task = {"kind": "dispatched", "width": 16, "top_k": 3, "tokens": [tokens] * 3}
    results = gang(task, UNEVEN, nodes=["a", "a", "b"]).results()
    assert all(torch.equal(remote, local) for result in results for remote, local in result["pairs"])
    busy, loads = np.zeros((3, 3)), np.zeros((3, 6))
    for rank, result in enumerate(results):
        for i, layer in enumerate(UNEVEN.layers):
            busy[i, rank] = sum(result["rows"][layer])
            np.add.at(loads[i], list(UNEVEN.held(layer, rank)), result["rows"][layer])
    np.testing.assert_allclose(busy, rank_loads(UNEVEN, loads), rtol=0.1)
    crossed = sum(result["bytes_to"][2] for result in results[:2]) + sum(results[2]["bytes_to"][:2])
    _, predicted = expected_traffic(UNEVEN, topology, loads).bytes_moved(16 * 4)
    assert crossed == pytest.approx(predicted, rel=0.05)
    _, without = expected_traffic(UNEVEN, Topology.of("abc"), loads).bytes_moved(16 * 4)
    assert crossed < 0.8 * without


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 600, (int(n),), generator=generator).tolist() for n in (3, 40, 17, 9, 25, 1, 33, 12)]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("mixtral", tokenizer=True)


REPLICATED = Placement(num_experts=5, layers=(0, 1, 2, 3), slots=(((0, 2, 4), (3, 1, 2), (2, 0)),) * 4)


def params(**settings: Any) -> list[dict[str, Any]]:
    """Of rows with an even number, greedy; of the others, sampled."""
    return [{"ignore_eos": True, "seed": 3, "temperature": temperature} | settings for temperature in (0.0, 1.5)]


def test_tokens_and_vectors_are_the_same_over_any_number_of_ranks(gang: Callable[..., Any], model: Path) -> None:
    task = {
        "kind": "answers",
        "model": str(model),
        "prompts": prompts(),
        "params": params(max_new_tokens=9, n=2),
        "engine": {"step_tokens": 48},
    }
    two = [request % 2 for request in range(16)]
    layouts = [
        (None, [0] * 16),
        (round_robin(range(4), 5, 2), two),
        (REPLICATED, [0] * 14 + [2, 2]),  # rank 1 has no work of its own at any time
    ]
    answers = []
    for placement, shares in layouts:
        results = gang(task | {"shares": shares, "late_s": [0.0, 0.3, 0.6]}, placement).results()
        answers.append({key: one for result in results for key, one in result["found"].items()})
        if placement is not None:
            assert len({result["steps"] for result in results}) == 1, "every rank steps as often"
            for rank, result in enumerate(results):
                assert {request for request, _ in result["found"]} == {r for r, s in enumerate(shares) if s == rank}
    assert len(answers[0]) == 8 * 2 + 8
    assert answers[1] == answers[0]
    assert answers[2] == answers[0]
    texts = [tuple(answers[0][2 * row, sample][0]) for row in range(8) for sample in range(2)]
    assert len(set(texts)) == 4 + 2 * 4, "greedy samples of a row are equal, all else differs"


def test_each_rank_holds_the_shared_weights_and_its_share_of_the_experts_in_memory(
    gang: Callable[..., Any], tiny_model: Callable[..., Path]
) -> None:
    """A model of 75 MB in experts and less than a MB in all else; a cache and buffers come to some MB."""
    sizes = {"intermediate_size": 1024, "num_local_experts": 24, "num_hidden_layers": 4, "hidden_size": 64}
    model = tiny_model("mixtral", **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    experts = 4 * 24 * 3 * 64 * 1024 * 4
    task = {"kind": "answers", "model": str(model), "prompts": prompts(), "params": params(max_new_tokens=2)}
    (alone,) = gang(task | {"shares": [0] * 16}, None).results()
    ranks = gang(task | {"shares": [0, 1, 2, 0] * 4}, round_robin(range(4), 24, 3)).results()
    assert alone["bank_bytes"] == experts
    rest = 20_000_000  # less than another rank's share of the experts
    assert experts < alone["resident_bytes"] < experts + rest
    for rank in ranks:
        assert rank["bank_bytes"] == experts / 3
        assert experts / 3 < rank["resident_bytes"] < experts / 3 + rest
    answers = {key: one for rank in ranks for key, one in rank["found"].items()}
    assert answers == alone["found"]


def test_a_rank_without_rows_is_lent_some_and_holds_only_its_share_of_the_weights(
    gang: Callable[..., Any], model: Path
) -> None:
    task = {
        "kind": "answers",
        "model": str(model),
        "prompts": prompts() * 4,
        "params": params(max_new_tokens=4),
        "shares": [0] * 64,
        "engine": {"step_tokens": 64},
    }
    first, second = gang(task, round_robin(range(4), 5, 2)).results()
    (alone,) = gang(task, None).results()
    assert first["found"] == alone["found"]
    assert second["found"] == {}
    assert 20 <= first["stats"]["lent_requests"] <= 40
    assert second["stats"]["requests"] == first["stats"]["lent_requests"]
    assert first["steps"] < 0.7 * alone["steps"]
    assert first["bank_bytes"] == alone["bank_bytes"] * 3 / 5
    assert second["bank_bytes"] == alone["bank_bytes"] * 2 / 5


def test_a_rank_that_dies_fails_the_others_exchange(gang: Callable[..., Any]) -> None:
    begun = time.monotonic()
    ranks = gang({"kind": "stopped", "signal": "SIGKILL"}, round_robin([0], 5, 3))
    survivors = ranks.results()[:2]
    assert time.monotonic() - begun < 100
    assert ranks.processes[2].exitcode == -signal.SIGKILL
    for survivor in survivors:
        assert survivor["error"], "an exchange with a dead rank can't succeed"


def test_a_rank_blocked_by_a_stopped_one_goes_on_in_other_threads_and_can_be_killed_and_a_new_generation_forms(
    gang: Callable[..., Any],
) -> None:
    stuck = gang({"kind": "stopped", "signal": "SIGSTOP"}, round_robin([0], 5, 2))
    deadline = time.monotonic() + 60
    beats = stuck.folder / "beats"
    while not (stuck.folder / "dead").exists() or not beats.exists() or beats.stat().st_size < 10:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert stuck.processes[0].is_alive(), "it waits in the exchange"
    stuck.end()
    task = {"kind": "dispatched", "width": 4, "top_k": 2, "tokens": [5, 6]}
    again = gang(task, round_robin([0], 5, 2), "worker-0.1").results()
    assert all(torch.equal(remote, local) for result in again for remote, local in result["pairs"])
