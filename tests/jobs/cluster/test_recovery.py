"""How many ranks a gang has on the nodes that are left, and what the report says of deaths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.cluster.recovery import RankNeeds, most_ranks, num_places, resized, room_left
from jobs.events import ReplicaDied, ReplicaResized, ShardId
from jobs.layout import HOST_SHARE, Layout
from jobs.mourning import Mourning, describe_deaths
from workers.forecast import Forecast, forecast
from workers.settings import EngineSettings


@pytest.fixture
def mixtral(tiny_model: Callable[..., Path]) -> Forecast:
    """Of 5 experts, so that each rank more takes less up to 5."""
    return forecast(EngineSettings(model_path=str(tiny_model("mixtral")), dtype="float32"), measures=False)


def layout(ranks: int, *, device: str = "cpu", memory_bytes: int = 0) -> Layout:
    return Layout(replicas=1, ranks=ranks, device=device, threads=2, memory_bytes=memory_bytes, why="as asked")


def test_a_rank_has_room_on_one_node_or_none() -> None:
    rooms = [{"CPU": 5.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 8.0}, {"CPU": 4.0}]
    assert num_places(rooms, {"CPU": 2.0}) == 4
    assert num_places(rooms, {"CPU": 2.0, "GPU": 1.0}) == 1
    assert num_places(rooms, {"CPU": 2.0, "GPU": 0.0}) == 4
    assert num_places(rooms, {"CPU": 2.0}, apart=True) == 2
    assert num_places([{"CPU": -3.0}], {"CPU": 2.0}) == 0, "others hold more than was counted on"


def test_what_other_replicas_hold_and_what_died_is_no_room() -> None:
    nodes = {"a": {"CPU": 4.0}, "b": {"CPU": 2.0}}
    held = [("a", {"CPU": 2.0}), ("gone", {"CPU": 2.0}), ("b", {"CPU": 2.0, "memory": 1.0})]
    assert num_places(room_left(nodes, held), {"CPU": 2.0}) == 1
    assert nodes == {"a": {"CPU": 4.0}, "b": {"CPU": 2.0}}


def test_a_gang_forms_with_as_many_ranks_as_have_room_if_they_hold_the_model(mixtral: Forecast) -> None:
    needs = RankNeeds(layout=layout(3), forecast=mixtral, gpu_bytes=None)
    large = {"CPU": 2.0, "memory": mixtral.rank_bytes(1) / HOST_SHARE}
    small = {"CPU": 2.0, "memory": mixtral.rank_bytes(2) / HOST_SHARE}
    assert most_ranks([large] * 3, needs.of, 3) == 3
    assert most_ranks([small] * 2, needs.of, 3) == 2
    assert most_ranks([small], needs.of, 3) == 0, "one rank would hold all experts"
    assert most_ranks([large], needs.of, 3) == 1
    assert most_ranks([{"CPU": 6.0, "memory": small["memory"]}], needs.of, 3) == 3, "as it was laid out"
    assert most_ranks([{"CPU": 4.0, "memory": small["memory"]}], needs.of, 3) == 0, "two would share the memory of one"
    assert "1 of a replica's 3 workers have room on the nodes that are left, and over 1" in needs.why_not(3, 1, 0)
    assert needs.why_not(3, 2, 2) == "2 of a replica's 3 workers have room on the nodes that are left"
    assert "none of a replica's 3 workers have room" in needs.why_not(3, 0, 0)


def test_on_gpus_a_rank_takes_one_whose_memory_is_known(mixtral: Forecast) -> None:
    gpus, two = [{"CPU": 8.0, "GPU": 2.0}], mixtral.rank_bytes(2)
    for gpu_bytes, expected in ((int(two / 0.8) + 1, 2), (two, 0), (None, 0)):
        needs = RankNeeds(layout=layout(4, device="cuda"), forecast=mixtral, gpu_bytes=gpu_bytes)
        assert most_ranks(gpus, needs.of, 4) == expected
    unknown = RankNeeds(layout=layout(4, device="cuda"), forecast=None, gpu_bytes=None)
    assert most_ranks(gpus, unknown.of, 4) == 2


def test_memory_that_is_set_aside_grows_with_a_ranks_share(mixtral: Forecast) -> None:
    aside = layout(3, memory_bytes=mixtral.rank_bytes(3))
    assert resized(aside, 2, mixtral).memory_bytes == mixtral.rank_bytes(2) > aside.memory_bytes
    assert (resized(aside, 1, mixtral).memory_bytes, resized(aside, 1, mixtral).ranks) == (0, 1)
    assert resized(layout(3), 2, mixtral).memory_bytes == 0
    assert resized(layout(3), 3, None) == layout(3)


def test_spare_slots_make_room_for_the_experts_that_fewer_ranks_hold(mixtral: Forecast) -> None:
    for before, spare, ranks, after in ((3, 2, 2, 1), (5, 1, 4, 0), (4, 3, 3, 3), (3, 3, 1, 0)):
        given = replace(layout(before, memory_bytes=1), spare_experts=spare)
        assert resized(given, ranks, mixtral).spare_experts == after
    roomy = resized(replace(layout(3, memory_bytes=1), spare_experts=2), 2, mixtral)
    assert roomy.memory_bytes == mixtral.rank_bytes(2) + mixtral.bytes_of_an_expert


def test_a_death_is_over_with_the_first_step_after_it() -> None:
    mourning = Mourning(began_at=100.0)
    for rank, split in ((0, 0), (1, 1), (1, 2)):
        mourning.grant(ShardId(0, 0, rank), split)
    mourning.grant(ShardId(1, 0, 0), 3)
    mourning.commit(1)
    mourning.mourn(ReplicaDied(0, 0, "killed", 0.25), 103.0)
    mourning.is_ready(0, 105.0, stepped=False)
    mourning.mourn(ReplicaDied(0, 1, "killed again"), 106.0)
    mourning.resize(ReplicaResized(0, 2, 1, "a node is gone"))
    facts = mourning.facts()
    assert [death["splits_again"] for death in facts["deaths"]] == [2, 0]
    assert [death["recovered_after_s"] for death in facts["deaths"]] == [None, None], "it was ready, and did nothing"
    assert facts["recovery"] is None
    mourning.is_ready(1, 107.0, stepped=True)
    mourning.is_ready(0, 108.0, stepped=False)
    mourning.is_ready(0, 109.0, stepped=True)
    mourning.is_ready(0, 150.0, stepped=True)
    facts = mourning.facts()
    assert facts["deaths"] == [
        {"replica": 0, "at_s": 3.0, "reason": "killed", "unheard_s": 0.25, "splits_again": 2, "recovered_after_s": 6.0},
        {
            "replica": 0,
            "at_s": 6.0,
            "reason": "killed again",
            "unheard_s": None,
            "splits_again": 0,
            "recovered_after_s": 3.0,
            "ranks": 1,
        },
    ]
    assert facts["splits_leased"] == 4
    assert facts["recovery"] == {"mean_s": 4.5, "worst_s": 6.0}
    words = describe_deaths(facts["deaths"])
    assert words == (
        "replicas died 2 times (the last: killed again); 2 splits were done again; "
        "work went on after 0:06 at worst, 0:04 on average; with 1 rank"
    )


def test_one_death_is_told_in_a_line() -> None:
    death = {"replica": 0, "reason": "a\nprocess", "splits_again": 1, "recovered_after_s": None, "ranks": 0}
    assert describe_deaths([death]) == "a replica died (a process); 1 split was done again; a replica has no room left"
