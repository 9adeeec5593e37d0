"""What a report says of experts: counted on ranks, and compared with experts dealt out in turn for the same routing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jobs.experts.expert_report import MAX_GANGS, describe_experts, expert_report
from jobs.experts.expert_tally import GangWork
from workers.parallel.expert_work import ExpertWork, by_expert
from workers.parallel.placement import Placement

# The two hot experts of each layer, 0 and 2, lie together where experts are dealt out in turn.
PLACEMENT = Placement(num_experts=4, layers=(1, 2), slots=(((0, 1), (3, 2)),) * 2)
FACTS = {"rows": 8, "tokens": 90, "seconds": 2.5, "moving_s": 1.5}
RECORD = {"placement": PLACEMENT.to_json(), "origin": "planned", "predicted_balance": 1.1, "calibration": FACTS}


def work(gang: str, *ranks: dict[int, list[int]], nodes: str = "ab", **other: Any) -> GangWork:
    return GangWork(
        gang,
        nodes=dict(enumerate(nodes)),
        work={
            rank: ExpertWork(
                rows={layer: np.array(counts) for layer, counts in rows.items()},
                bytes_to=((0, 100), (60, 0))[rank] if len(ranks) > 1 else (),
                row_bytes=8,
            )
            for rank, rows in enumerate(ranks)
        },
    )


TWO_RANKS = work("worker-0.0", {1: [40, 10, 0, 0], 2: [20, 5, 0, 0]}, {1: [0, 0, 40, 10], 2: [0, 0, 20, 5]})


def test_rows_in_slots_are_rows_of_the_experts_that_lie_there() -> None:
    assert by_expert(np.array([7, 9]), (3, 0), 4).tolist() == [9, 0, 0, 7]


def test_a_gang_is_compared_with_experts_dealt_out_in_turn() -> None:
    report = expert_report(None, [TWO_RANKS], {"worker-0.0": RECORD}.get)
    assert report is not None
    assert report["layers"] == [1, 2]
    assert report["rows"] == [[40, 10, 40, 10], [20, 5, 20, 5]]
    (gang,) = report["gangs"]
    assert gang["rows"] == [[50, 50], [25, 25]]
    assert gang["balance"] == {"predicted": 1.1, "achieved": 1.0, "round_robin": 1.6}
    assert (gang["bytes"]["within"], gang["bytes"]["across"]) == (0, 160), "the ranks are on two nodes"
    # In turn: half of each expert's 150 tokens come from the other rank, 8 bytes there and 8 back.
    assert gang["bytes"]["round_robin"] == {"within": 0, "across": 75 * 8 * 2}
    assert (gang["origin"], gang["calibration"]) == ("planned", FACTS)


def test_ranks_of_one_node_move_nothing_across() -> None:
    gang = GangWork("worker-0.0", nodes={0: "a", 1: "a"}, work=TWO_RANKS.work)
    report = expert_report(None, [gang], {"worker-0.0": RECORD}.get)
    assert report is not None
    assert (report["gangs"][0]["bytes"]["within"], report["gangs"][0]["bytes"]["across"]) == (160, 0)


def test_runs_add_up_and_the_latest_gangs_are_kept() -> None:
    report = None
    for _ in range(MAX_GANGS + 3):
        report = expert_report(report, [TWO_RANKS], {"worker-0.0": RECORD}.get)
    assert report is not None
    assert report["rows"][1] == [count * (MAX_GANGS + 3) for count in (20, 5, 20, 5)]
    assert len(report["gangs"]) == MAX_GANGS
    assert expert_report(report, [], {}.get) == report


def test_a_rank_alone_counts_and_is_no_gang() -> None:
    report = expert_report(None, [work("worker-0.0", {0: [3, 4]})], lambda gang: pytest.fail("it has no record"))
    assert report == {"layers": [0], "rows": [[3, 4]], "gangs": []}
    assert describe_experts(report) == []
    assert expert_report(None, [GangWork("worker-0.0", work={0: ExpertWork(rows={})})], {}.get) is None


def test_a_gang_that_was_not_heard_as_a_whole_is_only_counted() -> None:
    half = GangWork("worker-0.0", nodes={0: "a"}, work={0: TWO_RANKS.work[0]})
    early = work("worker-0.0", {1: [40, 10, 0, 0], 2: [20, 5, 0, 0]}, {})
    for gang, records in ((half, {"worker-0.0": RECORD}), (early, {"worker-0.0": RECORD}), (TWO_RANKS, {})):
        report = expert_report(None, [gang], records.get)
        assert report is not None
        assert report["gangs"] == []
        assert report["rows"][0][0] == 40


def test_people_are_told_what_placement_gave() -> None:
    report = expert_report(None, [TWO_RANKS], {"worker-0.0": RECORD}.get)
    told = " ".join(describe_experts(report))
    for words in (
        "1.00 times the mean",
        "1.10 was foretold",
        "in turn: 1.60",
        "160 bytes across",
        "1.2 KiB",
        "by 8 rows, which took 2.5 s",
    ):
        assert words in told
