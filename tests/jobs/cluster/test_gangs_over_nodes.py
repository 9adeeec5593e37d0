"""Gangs whose ranks are on several nodes of a real Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.client import DEFAULT_ENGINE

pytestmark = pytest.mark.ray


def placements(out: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("placements/*.json"))]


def test_a_gang_over_two_nodes_gives_the_rows_of_one_rank(nodes, moe_job, moe_rows, controller, rows_of):
    settings = moe_job("spread", expert_parallel=2)
    out = Path(settings["output"]["path"])
    status, _, stderr = controller(settings, address=nodes.address, engine_factory=DEFAULT_ENGINE).end(120)
    assert status == 0, stderr
    assert rows_of(out) == moe_rows
    (record,) = placements(out)
    assert set(record["nodes"]) == {nodes.id_of("a"), nodes.id_of("b")}
