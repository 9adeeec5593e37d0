"""Each gang's placement is recorded, and the last that fits is taken over by the next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.placements import ExpertLayers, last_that_fits, place_experts
from pipeline.job_folder import JobFolder
from workers.parallel.placement import Placement, round_robin

EXPERTS = ExpertLayers(layers=(1, 2), num_experts=4)


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    folder = JobFolder(tmp_path)
    folder.create()
    return folder


def records(folder: JobFolder) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(folder.placements.glob("*"))]


def test_the_first_gang_deals_experts_out_and_later_ones_take_that_over(folder: JobFolder) -> None:
    first = place_experts(folder, EXPERTS, ["a", "a"], gang="worker-0.0")
    assert first == round_robin((1, 2), 4, 2)
    again = place_experts(folder, EXPERTS, ["b", "b"], gang="worker-0.1")
    assert again == first
    assert [record["gang"] for record in records(folder)] == ["worker-0.0", "worker-0.1"]
    assert [record["origin"] for record in records(folder)] == ["round robin", "an earlier gang's"]
    assert records(folder)[1]["nodes"] == ["b", "b"]


def test_a_placement_for_other_ranks_nodes_or_experts_is_passed_over(folder: JobFolder) -> None:
    measured = Placement(num_experts=4, layers=(1, 2), slots=(((3, 0), (1, 2, 0)),) * 2)
    folder.placements.mkdir()
    document = {"gang": "g", "ranks": 2, "nodes": ["a", "b"], "origin": "loads", "placement": measured.to_json()}
    (folder.placements / "000000.json").write_text(json.dumps(document))
    (folder.placements / "000001.json").write_text("{half of it")
    assert last_that_fits(folder, EXPERTS, ["x", "y"]) == measured
    assert last_that_fits(folder, EXPERTS, ["x", "x"]) is None, "its replicas were placed for two nodes"
    assert last_that_fits(folder, EXPERTS, ["x", "y", "z"]) is None
    assert last_that_fits(folder, ExpertLayers(layers=(1,), num_experts=4), ["x", "y"]) is None
    assert place_experts(folder, EXPERTS, ["x", "y"], gang="worker-0.0") == measured
    assert sorted(path.name for path in folder.placements.iterdir())[-1] == "000002.json"
