"""Placement by measured loads where it saves the way over the network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.client import DEFAULT_ENGINE

pytestmark = pytest.mark.ray


def test_each_node_gets_its_own_copy_of_hot_experts_and_less_crosses(nodes, skewed_job, controller):
    settings = skewed_job("apart", expert_parallel=2, calibration_rows=8, spare_experts=2)
    status, _, stderr = controller(settings, address=nodes.address, engine_factory=DEFAULT_ENGINE, limit=24).end(120)
    assert status == 0, stderr
    report = json.loads(Path(settings["output"]["path"], "report.json").read_text())
    (gang,) = report["experts"]["gangs"]
    assert gang["nodes"] == [0, 1]
    moved, in_turn = gang["bytes"], gang["bytes"]["round_robin"]
    assert moved["within"] == in_turn["within"] == 0
    assert 0 < moved["across"] < 0.6 * in_turn["across"]
