"""Each gang's placement is recorded, and the last that fits is taken over by the next; else measured loads make one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.experts.placements import (
    DEALT_OUT,
    MEASURED,
    ExpertLayers,
    last_that_fits,
    loads_file,
    place_experts,
    record_calibration,
    record_of,
)
from pipeline.job_folder import JobFolder
from workers.parallel.loads import ExpertLoads
from workers.parallel.placement import Placement, round_robin
from workers.parallel.prediction import rank_loads

EXPERTS = ExpertLayers(layers=(1, 2), num_experts=4)


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    folder = JobFolder(tmp_path)
    folder.create()
    return folder


def records(folder: JobFolder) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(folder.placements.glob("*"))]


def document(placement: Placement, nodes: list[str], origin: str = MEASURED) -> str:
    return json.dumps({"gang": "g", "nodes": nodes, "origin": origin, "placement": placement.to_json()})


def skewed() -> ExpertLoads:
    """Experts 0 and 2, which are dealt out to the same of two ranks, are all that is chosen."""
    loads = ExpertLoads(layers=EXPERTS.layers, num_experts=4)
    for layer in EXPERTS.layers:
        loads.add(layer, np.array([[0, 2]] * 50 + [[0, 1]] * 4))
    return loads


def found(placement: Placement, loads: ExpertLoads) -> dict[str, Any]:
    return {"placement": placement.to_json(), "loads": loads.to_json(), "facts": {"rows": 54}}


def test_the_first_gang_deals_experts_out_and_later_ones_take_that_over(folder: JobFolder) -> None:
    first = place_experts(folder, EXPERTS, ["a", "a"], gang="worker-0.0")
    assert (first.placement, first.calibrates) == (round_robin((1, 2), 4, 2), False)
    again = place_experts(folder, EXPERTS, ["b", "b"], gang="worker-0.1")
    assert again == first
    assert [record["gang"] for record in records(folder)] == ["worker-0.0", "worker-0.1"]
    assert [record["origin"] for record in records(folder)] == [DEALT_OUT, DEALT_OUT]
    assert [record["taken_over"] for record in records(folder)] == [False, True]
    assert records(folder)[1]["nodes"] == ["b", "b"]


def test_a_placement_for_other_ranks_nodes_experts_or_slots_is_passed_over(folder: JobFolder) -> None:
    measured = Placement(num_experts=4, layers=(1, 2), slots=(((3, 0), (1, 2, 0)),) * 2)
    folder.placements.mkdir()
    (folder.placements / "000000.json").write_text(document(measured, ["a", "b"]))
    (folder.placements / "000001.json").write_text("{half of it")

    def fitting(*nodes: str, experts: ExpertLayers = EXPERTS, slots: int = 3) -> Placement | None:
        record = last_that_fits(folder, experts, nodes, slots=slots)
        return None if record is None else Placement.from_json(record["placement"])

    assert fitting("x", "y") == measured
    assert fitting("x", "x") is None, "its replicas were placed for two nodes"
    assert fitting("x", "y", "z") is None
    assert fitting("x", "y", experts=ExpertLayers(layers=(1,), num_experts=4)) is None
    assert fitting("x", "y", slots=2) is None, "there is no more room for three"
    assert place_experts(folder, EXPERTS, ["x", "y"], gang="worker-0.0", spare_slots=1).placement == measured
    assert sorted(path.name for path in folder.placements.iterdir())[-1] == "000002.json"


def test_a_gang_that_is_to_calibrate_has_no_record_until_it_did(folder: JobFolder) -> None:
    seating = place_experts(folder, EXPERTS, ["a", "a"], gang="worker-0.0", calibrates=True)
    assert (seating.placement, seating.calibrates) == (round_robin((1, 2), 4, 2, 2), True)
    assert not folder.placements.exists()
    planned = Placement(num_experts=4, layers=(1, 2), slots=(((0, 1), (2, 3)),) * 2)
    record_calibration(folder, ["a", "a"], found(planned, skewed()), gang="worker-0.0")
    record = record_of(folder, "worker-0.0")
    assert record is not None
    assert (record["origin"], record["calibration"]) == (MEASURED, {"rows": 54})
    assert record["predicted_balance"] == pytest.approx(58 / 54, abs=1e-4)
    again = place_experts(folder, EXPERTS, ["b", "b"], gang="worker-0.1", calibrates=True)
    assert (again.placement, again.calibrates) == (planned, False)
    assert records(folder)[1]["calibration"] is None, "it cost this gang nothing"


def test_known_loads_place_experts_for_other_ranks_without_measuring_again(folder: JobFolder) -> None:
    record_calibration(folder, ["a"] * 4, found(round_robin((1, 2), 4, 4), skewed()), gang="worker-0.0")
    seating = place_experts(folder, EXPERTS, ["a", "a"], gang="worker-0.1", calibrates=True)
    assert not seating.calibrates
    assert rank_loads(seating.placement, skewed().counts).max() == 54
    loads_file(folder).write_text("{half of it")
    assert place_experts(folder, EXPERTS, ["a", "a", "a"], gang="worker-0.2", calibrates=True).calibrates


def test_experts_that_were_dealt_out_without_looking_are_looked_at_once_that_is_asked(folder: JobFolder) -> None:
    place_experts(folder, EXPERTS, ["a", "a"], gang="worker-0.0")
    assert place_experts(folder, EXPERTS, ["a", "a"], gang="worker-0.1", calibrates=True).calibrates


def test_spare_slots_are_filled_from_the_beginning_so_that_memory_stays_as_it_is(folder: JobFolder) -> None:
    for spare, most in ((1, 3), (9, 4)):
        seating = place_experts(folder, EXPERTS, ["a", "a"], gang="g", spare_slots=spare, calibrates=True)
        assert {len(held) for ranks in seating.placement.slots for held in ranks} == {most}
